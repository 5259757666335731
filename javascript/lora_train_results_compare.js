/* Runs compared on the page "3 Results": what differs, what each is worth, the best as far as chance allows to say; their curves in
 * one chart, their pictures of the same prompt and seed beside each other. Runs that differ in their seed alone are one row.
 */
(function(results) {
    "use strict";
    const TRAIN = 1, GAIN = "held_out_gain", LOSS = "held_out_loss";
    const WIDEST = 760, HEIGHT = 240, PAD = {left: 44, right: 14, top: 8, bottom: 20};

    const colour = (number) => `hsl(${Math.round(210 + number * 137.5) % 360} 65% 50%)`;
    const address = (run, file, small) => `results/file?run=${encodeURIComponent(run)}&name=${encodeURIComponent(file)}` + (small ? "&small=1" : "");

    /** What a verdict's finding is called in a line. */
    results.findingWords = (run) => {
        const {translated} = window.loraTrainStudio.parts;
        const words = {
            learning: translated("it learns"), "too slow": translated("learns too slowly"), plateau: translated("learns no more"),
            "no effect": translated("has no effect"), diverging: translated("diverges"), overfitting: translated("overfitted"),
            ruined: translated("ruined"), words: translated("see its captions"), stopped: translated("stopped"),
            rate: translated("learning rate found"), failed: translated("failed"), interrupted: translated("interrupted"), running: translated("running"),
        };
        const ended = run.outcome !== "done" && words[run.outcome];
        return run.verdict === "ruined" ? words.ruined : ended || words[run.finding] || "";
    };

    results.measureLabel = (name) => {
        const {translated} = window.loraTrainStudio.parts;
        return {...results.scoreLabels(translated), [GAIN]: translated("held-out gain"), [LOSS]: translated("held-out loss")}[name];
    };

    results.measureText = (name, mean, deviation) => {
        if (mean === null || mean === undefined) return "–";
        const digits = name === GAIN ? 1 : 3, spread = deviation === null || deviation === undefined ? "" : " ± " + deviation.toFixed(digits);
        return mean.toFixed(digits).replace("-", "\u2212") + spread + (name === GAIN ? " %" : "");
    };

    /** Put a run's settings into the fields of the page "2 Train". */
    results.useSettings = (app, run) => app.act(async() => {
        const {settings} = await app.page.api.ask("history/settings?run=" + encodeURIComponent(run));
        await app.page.fill({values: settings});
        app.page.turnTo(TRAIN);
    });

    results.comparison = function(app) {
        const {make, button, count, translated} = window.loraTrainStudio.parts;
        const element = make("section", {class: "ltr-section ltr-compare", id: "lora_train_comparison", tabindex: "-1", hidden: true});
        let opener = null;

        /** The keyboard goes back to the button that was pressed, or to the one in its place. */
        function close() {
            element.hidden = true;
            const again = opener.isConnected ? opener : opener.id && app.place.querySelector("#" + opener.id);
            (again || app.place.querySelector("#lora_train_runs > summary")).focus();
        }

        function show(request) {
            opener = document.activeElement;
            return app.act(() => app.page.api.ask("compare", request), draw);
        }

        /** What the names of a row's runs have in common, without the seed. */
        function named({runs}) {
            const shared = runs.map((run) => run.name).reduce((one, other) => {
                let length = 0;
                while (length < one.length && one[length] === other[length]) length += 1;
                return one.slice(0, length);
            });
            return (runs.length > 1 && shared.replace(/[-_ ]*(seed)?[-_ ]*$/, "")) || runs[0].name;
        }

        /** What tells a row from the others. */
        const label = (found, row) => found.settings.map((name) => `${name} ${row.settings[name]}`).join(" · ") || named(row);

        function cells(found, row, number) {
            const verdicts = [...new Set(row.runs.map(results.findingWords))].filter(Boolean).join(", ");
            const noise = {none: translated("no difference beyond the spread of seeds"), "not known": translated("the spread is not known")};
            return [
                make("th", {scope: "row", title: row.runs.map((run) => run.run).join("\n")}, make("i", {class: "ltr-key", style: "background: " + colour(number)}),
                    make("span", {translate: "no", text: named(row)}), row.best && make("b", {text: " ★ " + translated("best")}),
                    make("small", {text: row.runs.length > 1 ? translated`seeds ${row.runs.map((run) => run.seed).join(", ")}` : ""}),
                    noise[row.difference] && make("small", {text: noise[row.difference]})),
                ...found.settings.map((name) => make("td", {translate: "no", text: String(row.settings[name])})),
                make("td", {text: verdicts}), make("td", {text: String(row.runs.length)}),
                ...found.measures.map((name) => make("td", {class: name === found.measure ? "ltr-decides" : null,
                    text: results.measureText(name, row.measures[name].mean, row.measures[name].deviation)})),
                make("td", {}, row.runs[0].usable && button("Use these settings", () => results.useSettings(app, row.runs[0].run), {
                    title: "Put them into the fields of the page 2 Train; the name stays."}))];
        }

        function table(found) {
            const head = [translated("Run"), ...found.settings, translated("verdict"), "n", ...found.measures.map(results.measureLabel), ""];
            return make("div", {class: "ltr-scroll", tabindex: "0"}, make("table", {class: "ltr-table"},
                make("thead", {}, make("tr", {}, ...head.map((text) => make("th", {scope: "col", text})))),
                make("tbody", {}, ...found.rows.map((row, number) => make("tr", {"data-best": row.best}, ...cells(found, row, number))))));
        }

        /** What is other in the pictures of a row than in those of the first. */
        function changes(found) {
            return found.rows.map((row, number) => {
                const told = row.changes || {}, some = (names) => names.slice(0, 5).join(", ") + (names.length > 5 ? " …" : "");
                const said = [
                    (told.added || []).length && translated`added: ${some(told.added)}`, (told.removed || []).length && translated`removed: ${some(told.removed)}`,
                    (told.changed || []).length && translated`changed: ${some(told.changed)}`,
                    (told.captions || []).length && translated`other captions: ${some(told.captions)}`].filter(Boolean);
                return said.length ? make("p", {}, make("i", {class: "ltr-key", style: "background: " + colour(number)}),
                    translated("Pictures") + ": " + said.join(" · ")) : null;
            }).filter(Boolean);
        }

        function chart(found) {
            const {shape, ticks} = window.loraTrainChart, curves = found.curves.filter((curve) => curve.points.length > 1);
            if (!curves.length) return null;
            const width = Math.min(WIDEST, element.clientWidth || WIDEST), height = HEIGHT;
            const all = curves.flatMap((curve) => curve.points), last = Math.max(...all.map((point) => point[0]));
            const values = all.map((point) => point[1]), low = Math.min(0, ...values), high = Math.max(2, ...values);
            const x = (step) => PAD.left + step / Math.max(1, last) * (width - PAD.left - PAD.right);
            const y = (value) => height - PAD.bottom - (value - low) / (high - low) * (height - PAD.bottom - PAD.top);
            const drawing = shape("svg", {viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": translated("Better than the base model")});
            const vertical = ticks(low, high, 4);
            for (const value of vertical.values) {
                drawing.append(shape("line", {class: "grid", x1: PAD.left, x2: width - PAD.right, y1: y(value), y2: y(value)}),
                    shape("text", {x: PAD.left - 6, y: y(value) + 4, "text-anchor": "end"}, value.toFixed(vertical.digits) + " %"));
            }
            for (const value of ticks(0, last, 6).values.filter(Number.isInteger)) {
                drawing.append(shape("text", {x: x(value), y: height - 5, "text-anchor": "middle"}, String(value)));
            }
            for (const {row, run, points} of curves) {
                const line = shape("path", {d: "M" + points.map(([step, value]) => x(step).toFixed(1) + "," + y(value).toFixed(1)).join("L"),
                    style: "stroke: " + colour(row), "stroke-width": found.rows[row].best ? 2.5 : 1.5});
                line.append(shape("title", {}, run));
                drawing.append(line);
            }
            return make("div", {class: "lora-train-curve ltr-curves"}, make("div", {class: "lora-train-legend"},
                make("b", {text: translated("Better than the base model"), title: curves.every((curve) => curve.held_out) ? translated("held-out pictures") : null}),
                ...found.rows.map((row, number) => make("span", {class: "lora-train-key", translate: "no"},
                    make("i", {style: "border-color: " + colour(number)}), label(found, row)))),
            make("div", {class: "lora-train-plot"}, drawing));
        }

        function samples(found) {
            const title = (row, id) => {
                const {seed} = row.runs.find((run) => run.run === id);
                return label(found, row) + (row.runs.length > 1 ? " · " + translated`seed ${seed}` : "");
            };
            const places = found.samples.map(({prompt, seed, pictures}) => pictures.map(({run, row, file}) => ({
                path: address(run, file, false), small: address(run, file, true), title: title(found.rows[row], run), row,
                about: `${prompt} · ` + translated`seed ${seed}`,
            })));
            return places.map((entries, index) => make("div", {class: "ltr-together"},
                make("p", {class: "lts-quiet", translate: "no", text: entries[0].about}),
                make("div", {class: "ltr-cells"}, ...entries.map((entry, column) => {
                    const image = make("img", {alt: ""});
                    app.page.pictures.showInSight(image, entry.small);
                    return make("figure", {}, make("button", {type: "button", class: "ltr-cell", title: entry.title, "aria-label": entry.title,
                        onclick: () => app.page.zoom(places, index, column)}, image),
                    make("figcaption", {translate: "no"}, make("i", {class: "ltr-key", style: "background: " + colour(entry.row)}), entry.title));
                }))));
        }

        function draw(found) {
            element.hidden = false;
            element.replaceChildren(...[
                make("div", {class: "ltr-line"}, make("h4", {text: found.sweep ? translated`Sweep ${found.sweep.name}` : translated("Comparison")}),
                    make("span", {class: "lts-quiet", text: count(found.curves.length, "run")}),
                    button("Close", close, {kind: "tool", drawn: "close"})),
                found.reason && make("p", {class: "ltr-reason", text: translated(found.reason)}), table(found),
                make("div", {class: "ltr-notes lts-quiet"}, ...changes(found), ...found.notes.map((text) => make("p", {text: translated(text)}))),
                chart(found), ...samples(found)].filter(Boolean));
            element.focus({preventScroll: true});
            element.scrollIntoView({block: "start"});
        }

        return {element, show};
    };
})(window.loraTrainResults = window.loraTrainResults || {});
