/* The grid of a run on the page "3 Results": its saves at several weights, painted from the same prompts and seeds beside the base
 * model; what each is worth in four numbers. The form says what is painted, and is folded: everything has a default.
 */
(function(results) {
    "use strict";
    const BASE = "", EXTRAS = [
        ["average", "Average of the last saves", "The mean of the weights of the last saves: often smoother than any of them."],
        ["unet", "UNet only", "What the picture part of the network learnt, without the text encoder's."],
        ["text", "Text encoder only", "What the text encoder learnt, without the UNet's."],
    ];
    /** What was measured, by its name in the API. */
    const LABELS = (translated) => ({
        likeness: translated("likeness"), prompt_following: translated("prompt"), tag_recall: translated("tags"),
        drift: translated("drift"), copy_risk: translated("copies"),
    });
    results.scoreLabels = LABELS;
    // Its name in the API, what it says.
    const NUMBERS = [
        ["likeness", "How alike the pictures are to those that were not trained on, patch by patch. Higher is better."],
        ["prompt_following", "How well they follow the prompt without the trigger word. About 0 is good; much lower forgets what was asked for."],
        ["tag_recall", "How many of the prompt's tags a tagger finds in them. Higher is better."],
        ["drift", "How far pictures without the trigger word move away from the base model's. Lower is better."],
        ["copy_risk", "How much nearer they are to a picture that was trained than to a held-out one. Lower is better; higher copies."],
    ];

    /** "+12 ±3" or "+0.4 ±0.1", in hundredths. */
    function number(value, spread) {
        const digits = Math.abs(100 * value) < 9.95 ? 1 : 0, shown = (100 * value).toFixed(digits).replace("-", "\u2212");
        const told = Number(shown.replace("\u2212", "")) === 0 ? "0" : value > 0 ? "+" + shown : shown;
        return told + (spread ? " ±" + (100 * spread).toFixed(digits) : "");
    }

    /** What was measured of a column of the grid, less what was measured of the base model: [{name, help, value, spread, kind}];
     * [] where nothing was. More likeness is what it is for; of the others the server says when they go too far. */
    function scoresOf(grid, column) {
        const scores = grid.scores[column], unadapted = grid.scores[0];
        return NUMBERS.filter(([name]) => scores && scores[name] && Number.isFinite(scores[name].mean)).map(([name, help]) => {
            const value = scores[name].mean - (unadapted[name].mean || 0), spread = scores[name].deviation;
            const clear = name === "likeness" && Math.abs(value) >= Math.max(0.005, spread || 0);
            return {name, help, value, spread, kind: clear ? (value > 0 ? "good" : "bad") : null};
        });
    }

    /** The same of one picture, in a line; the base model's of the same prompt and seed is the zero. */
    function wordsOf(grid, cell, translated) {
        const zero = grid.cells.find((one) => one.column === 0 && one.prompt === cell.prompt && one.seed === cell.seed);
        const scores = cell.scores || {}, unadapted = (zero && zero.scores) || {};
        return cell.column === 0 ? "" : NUMBERS.filter(([name]) => typeof scores[name] === "number").map(([name]) =>
            `${LABELS(translated)[name]} ${number(scores[name] - (unadapted[name] || 0))}`).join(" · ");
    }

    function numbers(scores) {
        const {make, translated} = window.loraTrainStudio.parts;
        return make("dl", {class: "ltr-numbers"}, ...scores.map(({name, help, value, spread, kind}) => make("div", {
            title: translated(help) + " " + translated("In hundredths; the base model is 0, ± is the spread over seeds."), "data-kind": kind,
        }, make("dt", {text: LABELS(translated)[name]}), make("dd", {text: number(value, spread)}))));
    }

    /** What the form asks for; an empty field leaves it to the server. */
    function makeForm(app) {
        const {make, field, tick, textBox, numberBox, translated} = window.loraTrainStudio.parts;
        const values = {weights: "", seeds: "", prompts: "", checkpoint: "", steps: null, cfg: null, sampler: "", extras: new Set(), saves: new Set()};
        const prompts = make("textarea", {
            class: "lts-input", rows: "3", id: "lora_train_grid_prompts", spellcheck: "false",
            placeholder: translated("One a line; empty takes captions of held-out pictures"), oninput: () => (values.prompts = prompts.value),
        });
        const saves = make("div", {class: "ltr-choices"});
        const numbersOf = (text) => (text.trim() ? text.split(/[\s,;]+/).filter(Boolean).map(Number) : null);
        const lines = (text) => text.split("\n").map((line) => line.trim()).filter(Boolean);
        const element = make("details", {class: "ltr-form"}, make("summary", {text: translated("What is painted")}),
            make("div", {class: "lts-line"},
                field("Weights", textBox("", (text) => (values.weights = text), {placeholder: "0.7, 1", id: "lora_train_grid_weights"}),
                    "How strongly the LoRA is applied, as in <lora:name:0.7>."),
                field("Seeds", textBox("", (text) => (values.seeds = text), {placeholder: "1000, 1001, 1002", id: "lora_train_grid_seeds"}),
                    "At least three show how far the numbers spread."),
                field("Sampler", textBox("", (text) => (values.sampler = text), {placeholder: "Euler", id: "lora_train_grid_sampler"}),
                    "By the name that txt2img has for it."),
                field("Sampling steps", numberBox("", (number) => (values.steps = number), {minimum: 1, maximum: 150, id: "lora_train_grid_steps"}),
                    "Empty takes 20."),
                field("CFG scale", numberBox("", (number) => (values.cfg = number), {minimum: 1, maximum: 30, step: 0.5, id: "lora_train_grid_cfg"}),
                    "Empty takes 7."),
                field("Another checkpoint", textBox("", (text) => (values.checkpoint = text), {
                    placeholder: "works on others too?", id: "lora_train_grid_checkpoint",
                }), "Name of a checkpoint to paint on instead of the one that is loaded.")),
            field("Prompts", prompts, "Without the LoRA, which is added to each."),
            field("Saves", saves, "Empty takes up to five over the run."),
            make("div", {class: "lts-line"}, ...EXTRAS.map(([name, words, help]) => tick(words, false,
                (on) => values.extras[on ? "add" : "delete"](name), help))));
        let known = "";

        function draw(found) {
            const usable = found.saves.filter((save) => save.exists), now = JSON.stringify([found.run, usable.map((save) => save.id)]);
            if (now === known) return;
            known = now;
            values.saves.clear();
            saves.replaceChildren(...usable.map((save) => tick(results.saveName(app, save), false,
                (on) => values.saves[on ? "add" : "delete"](save.id))));
        }

        /** The request, without what was left empty. */
        function wish() {
            const asked = {
                weights: numbersOf(values.weights), seeds: numbersOf(values.seeds), prompts: lines(values.prompts),
                checkpoint: values.checkpoint.trim(), sampler: values.sampler.trim(), steps: values.steps, cfg: values.cfg, extras: [...values.extras], saves: [...values.saves],
            };
            return Object.fromEntries(Object.entries(asked).filter(([, value]) => (Array.isArray(value) ? value.length : value)));
        }

        return {element, draw, wish};
    }

    results.grid = function(app) {
        const {make, button, choice, pills, translated} = window.loraTrainStudio.parts;
        const form = makeForm(app), notes = make("div", {class: "ltr-notes"}), picker = make("div", {class: "lts-line lts-go"});
        const table = make("div", {class: "ltr-grid", role: "table", "aria-label": translated("Grid of saves and weights")});
        const paint = button("Paint the grid", () => results.paint(), {drawn: "picture", id: "lora_train_paint_grid"});
        const element = make("div", {class: "ltr-section", hidden: true},
            make("div", {class: "ltr-line"}, make("h4", {text: translated("Saves and weights")}), paint), form.element, notes, picker, table);
        let known = "", prompt = 0, places = [];

        /** A grid that was stopped goes on as it was, unless the form says otherwise. */
        results.paint = () => {
            const {grid, run, saves} = app.found, asked = form.wish();
            const goesOn = grid && grid.progress.done < grid.progress.total && !Object.keys(asked).length;
            return app.start("results/grid", {run, ...(goesOn ? wishOf(grid, saves) : asked)});
        };

        const different = (values) => [...new Set(values)];

        /** The request that made a grid. */
        function wishOf({columns, prompts, seeds, options}, saves) {
            const plain = columns.filter((column) => !column.part && saves.some((save) => save.id === column.save));
            return {
                saves: different(plain.map((column) => column.save)), weights: different(plain.map((column) => column.weight)),
                prompts: prompts.map(({text}) => text), seeds, checkpoint: options.checkpoint, sampler: options.sampler, steps: options.steps, cfg: options.cfg_scale,
                extras: different(columns.filter((column) => column.save).map((column) => column.part ||
                    (plain.includes(column) ? "" : "average"))).filter(Boolean),
            };
        }

        /** The columns of the file as rows of the page: [{name, about, columns: [{index, weight}]}], the base model first. */
        function rows(found) {
            const {columns} = found.grid, made = new Map();
            columns.forEach((column, index) => {
                const key = column.save + "\n" + column.part, save = found.saves.find((one) => one.id === column.save);
                if (!made.has(key)) made.set(key, {name: rowName(column, save), save: column.save, columns: []});
                made.get(key).columns.push({...column, index});
            });
            return [...made.values()];
        }

        function rowName(column, save) {
            if (column.save === BASE) return translated("Base model");
            const part = {unet: "UNet only", text: "Text encoder only"}[column.part];
            const name = save ? results.saveName(app, save) : translated("Average of the last saves");
            return part ? name + ", " + translated(part) : name;
        }

        const cellsOf = (grid, column) => grid.cells.filter((cell) => cell.column === column && cell.prompt === prompt);

        function tile(found, row, column, cell, place) {
            if (!cell.done) return make("span", {class: "ltr-cell", title: translated("Not painted yet")});
            const image = make("img", {alt: ""}), title = `${row.name} · ${results.weight(column.weight)} · ` + translated`seed ${cell.seed}`;
            app.page.pictures.showInSight(image, app.address(cell.file, true));
            return make("button", {
                type: "button", class: "ltr-cell", title, "aria-label": title, onclick: () => app.page.zoom(places, ...place),
            }, image);
        }

        /** Everything that can be seen in full size, a row of the page each. */
        function zoomable(found, list) {
            return list.map((row) => row.columns.flatMap((column) => cellsOf(found.grid, column.index).map((cell) => (cell.done ? {
                path: app.address(cell.file, false), small: app.address(cell.file, true),
                title: row.save === BASE ? row.name : translated`${row.name} at ${results.weight(column.weight)}`,
                about: [translated`seed ${cell.seed}`, wordsOf(found.grid, cell, translated), found.grid.prompts[prompt].text]
                    .filter(Boolean).join(" · "),
            } : null))));
        }

        /** The weight above a column, with what makes it the LoRA; parts of a save are no LoRA of their own. */
        function weightLine(column, chosen) {
            const words = results.weight(column.weight) + (chosen ? " · " + translated("recommended") : "");
            const there = app.found.saves.some((save) => save.id === column.save && save.exists) || column.save.endsWith("-average");
            return make("div", {class: "ltr-weight"}, make("span", {text: words}), column.part || column.problem || !there ? null : make("button", {
                type: "button", class: "ltr-take", text: translated("Take this one"),
                onclick: () => results.take(app, {id: column.save}, column.weight),
                title: translated("Make this save the LoRA, with this as its preferred weight."),
            }));
        }

        function drawTable(found) {
            const list = rows(found), {grid} = found, best = found.recommended;
            places = zoomable(found, list);
            table.replaceChildren(...list.map((row, number) => {
                let place = 0;
                return make("div", {class: "ltr-row", role: "row"}, make("div", {class: "ltr-row-name", role: "rowheader"}, make("b", {text: row.name})),
                    make("div", {class: "ltr-row-cells"}, ...row.columns.map((column) => {
                        const scores = row.save === BASE ? [] : scoresOf(grid, column.index);
                        const chosen = best && best.save === row.save && !column.part && Math.abs(best.weight - column.weight) < 1e-6;
                        return make("div", {class: "ltr-column", role: "cell", "data-best": Boolean(chosen)},
                            row.save === BASE ? null : weightLine(column, chosen),
                            column.problem ? make("small", {class: "ltr-problem", text: translated(column.problem)}) :
                                make("div", {class: "ltr-cells"}, ...cellsOf(grid, column.index).map((cell) =>
                                    tile(found, row, column, cell, [number, place++]))),
                            scores.length ? numbers(scores) : null,
                            scores.length && grid.scores[column.index].leaves.length ? make("small", {class: "ltr-problem ltr-leaves",
                                text: grid.scores[column.index].leaves.map((one) => translated(one)).join("; ")}) : null);
                    })));
            }));
        }

        function drawPicker(found) {
            const {prompts} = found.grid;
            if (prompt >= prompts.length) prompt = 0;
            const short = (text) => (text.length > 90 ? text.slice(0, 88) + "…" : text);
            picker.replaceChildren(choice(prompts.map(({text, triggered}, index) => [
                index, `${index + 1}. ${short(text)}${triggered ? "" : " · " + translated("without the trigger word")}`]), prompt, (chosen) => {
                prompt = chosen;
                known = "";
                draw();
            }, {id: "lora_train_grid_prompt", label: "Prompt", own: true}));
        }

        function draw() {
            const {found} = app;
            element.hidden = !found || !found.saves.some((save) => save.exists);
            if (element.hidden) return;
            form.draw(found);
            const {grid} = found, part = grid && grid.progress.done < grid.progress.total;
            paint.disabled = app.working();
            paint.lastChild.textContent = translated(part ? "Go on painting" : "Paint the grid");
            const now = JSON.stringify([found.run, grid, found.recommended, found.saves]);
            if (now === known) return;
            known = now;
            const said = grid ? grid.notes : [];
            notes.replaceChildren(...said.map((text) => make("p", {class: "lts-quiet", text: translated(text)})));
            table.hidden = picker.hidden = !grid;
            if (!grid) return;
            drawPicker(found);
            drawTable(found);
        }

        return {element, draw};
    };

})(window.loraTrainResults = window.loraTrainResults || {});
