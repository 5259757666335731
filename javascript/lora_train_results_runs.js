/* All runs on the page "3 Results", newest first, each with its picture, its scores and the disk it takes; marked ones are compared,
 * or deleted with their files. They are asked for a part at a time, as the list is scrolled.
 */
(function(results) {
    "use strict";
    const AT_ONCE = 24, GAIN = "held_out_gain";

    /** "12 MB" */
    const size = (bytes) => bytes < 1e9 ? (bytes / 1e6).toFixed(bytes < 1e7 ? 1 : 0) + " MB" : (bytes / 1e9).toFixed(1) + " GB";

    results.runs = function(app, compared) {
        const {make, button, count, tick, translated} = window.loraTrainStudio.parts;
        const chosen = new Set(), list = make("div", {class: "ltr-runs", role: "list"}), bar = make("div", {class: "ltr-line"});
        const total = make("span", {class: "lts-quiet"}), more = button("Show more", load, {id: "lora_train_runs_more"});
        const asking = make("div", {class: "ltr-asking", role: "alertdialog", hidden: true});
        const element = make("details", {class: "ltr-section", id: "lora_train_runs", ontoggle: () => element.open && renew()},
            make("summary", {text: translated("All runs")}), bar, asking, list, more);
        let entries = [], there = 0, seen = "", busy = false, wanted = 0;

        new IntersectionObserver((seenNow) => seenNow[seenNow.length - 1].isIntersecting && element.open && load()).observe(more);

        async function load() {
            if (busy || (entries.length && entries.length >= there)) return;
            busy = true;
            const mine = wanted;
            try {
                const found = await app.page.api.ask(`history?offset=${entries.length}&count=${AT_ONCE}`);
                if (mine !== wanted) return;
                there = found.total;
                const fresh = found.runs.filter((run) => entries.every((other) => other.id !== run.id));
                entries.push(...fresh);
                list.append(...fresh.map(entry));
                more.hidden = !found.runs.length || entries.length >= there;
                drawBar();
            } catch (error) {
                more.hidden = true;
                app.say(error.message, true);
            } finally {
                busy = false;
                if (mine !== wanted) load();
            }
        }

        /** From the first one again. */
        function renew() {
            wanted += 1;
            entries = [];
            list.replaceChildren();
            load();
            app.page.api.ask("history/disk").then((disk) => {
                total.textContent = `${count(disk.runs, "run")} · ` + translated`${size(disk.size)} of records and pictures, ${size(disk.lora_size)} of LoRAs`;
            }).catch(() => { total.textContent = ""; });
        }

        function drawBar() {
            for (const id of chosen) if (!entries.some((run) => run.id === id)) chosen.delete(id);
            const marked = [...chosen];
            bar.replaceChildren(total, ...marked.length ? [
                button(translated`Compare ${marked.length}`, () => compared.show({runs: marked.reverse()}), {
                    drawn: "scale", id: "lora_train_runs_compare", disabled: marked.length < 2,
                    title: marked.length < 2 ? "Mark another one to compare with" : "What differs, what each is worth, their curves and pictures"}),
                button(translated`Delete ${marked.length}`, () => ask(false), {drawn: "remove", id: "lora_train_runs_delete"}),
            ] : [make("span", {class: "lts-quiet", text: translated("Mark some to compare or delete them")})]);
        }

        /** What deleting takes away is told before, and asked. */
        function ask(loras) {
            const runs = [...chosen];
            return app.act(() => app.page.api.ask("history/deletion", {runs, loras}), (found) => {
                const names = found.loras.slice(0, 5).join(", ") + (found.loras.length > 5 ? " …" : "");
                asking.hidden = false;
                asking.replaceChildren(
                    make("p", {text: translated`Delete ${count(found.runs.length, "run")} with settings, curves and pictures? ${size(found.freed)} are freed.`}),
                    tick("Also the LoRAs that they wrote", loras, ask, "Without it no LoRA is touched."),
                    loras ? make("p", {class: "lts-quiet", translate: "no", text: names || "–"}) : null,
                    make("div", {class: "lts-line"}, button("Delete", () => remove(runs, loras), {kind: "stop", id: "lora_train_runs_sure"}),
                        button("Cancel", () => { asking.hidden = true; })));
                asking.querySelector("button").focus();
            });
        }

        function remove(runs, loras) {
            return app.act(() => app.page.api.ask("history/delete", {runs, loras}), (found) => {
                asking.hidden = true;
                compared.element.hidden = true;
                chosen.clear();
                app.runs = null;
                app.say(translated`Deleted ${count(found.runs.length, "run")}: ${size(found.freed)} are free again.`);
                app.renew();
                renew();
            });
        }

        function entry(run) {
            const name = run.name || run.id, image = make("img", {alt: ""});
            if (run.file) app.page.pictures.showInSight(image, `results/file?run=${encodeURIComponent(run.id)}&name=${encodeURIComponent(run.file)}&small=1`);
            const scores = Object.entries(run.scores).filter(([key, value]) => value !== null && ["likeness", "prompt_following", GAIN].includes(key))
                .map(([key, value]) => `${results.measureLabel(key)} ${results.measureText(key, value)}`);
            const date = run.started ? new Date(run.started * 1000).toLocaleString(window.loraTrainLanguage.tag, {dateStyle: "medium", timeStyle: "short"}) : "";
            return make("div", {class: "ltr-run", role: "listitem", "data-run": run.id},
                make("input", {type: "checkbox", class: "ltr-run-mark", "aria-label": translated`Mark ${name}`, checked: chosen.has(run.id), onchange: (event) => {
                    chosen[event.target.checked ? "add" : "delete"](run.id);
                    asking.hidden = true;
                    drawBar();
                }}), make("span", {class: "ltr-face"}, run.file ? image : null),
                make("div", {class: "ltr-run-words"}, make("b", {translate: "no", text: name}),
                    make("small", {text: [date, results.findingWords(run), run.total ? `${run.steps} / ${run.total}` : ""].filter(Boolean).join(" · ")}),
                    make("small", {text: scores.join(" · ")})),
                make("span", {class: "ltr-size", text: size(run.size + run.lora_size), title: translated`${size(run.size)} of records and pictures, ${size(run.lora_size)} of LoRAs`}),
                make("div", {class: "ltr-run-tools"},
                    run.sweep && button(translated`Sweep ${run.sweep.name}`, () => compared.show({sweep: run.sweep.id}), {title: "Compare the runs of this sweep"}),
                    button("Show", () => app.choose(run.id).then(() => app.place.scrollIntoView()), {title: "Show its results above"}),
                    button("Use these settings", () => results.useSettings(app, run.id), {title: "Put them into the fields of the page 2 Train; the name stays."})));
        }

        function draw() {
            const now = JSON.stringify((app.runs || []).map((run) => [run.id, run.outcome]));
            element.hidden = !(app.runs && app.runs.length);
            if (now === seen || !app.runs) return;
            seen = now;
            if (element.open) renew();
        }

        drawBar();
        return {element, draw};
    };
})(window.loraTrainResults = window.loraTrainResults || {});
