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
    const NUMBERS = [
        ["likeness", "likeness", 1, "How alike the pictures are to those that were not trained on, above the base model. Higher is better."],
        ["prompt", "prompt", 1, "How well they follow the rest of the prompt, against the base model. About 0 is good; much lower forgets what was asked for."],
        ["tags", "tags", 1, "How many of the prompt's tags a tagger finds in them, against the base model."],
        ["drift", "drift", -1, "How far pictures without the trigger word move away from the base model's. Lower is better."],
        ["copies", "copies", -1, "How much nearer they are to training pictures than to held-out ones, above the base model. Lower is better: higher copies."],
    ];

    results.NUMBERS = NUMBERS;

    /** "+12 ±3" of shares between 0 and 1. */
    function number({value, spread}) {
        const shown = (share) => Math.abs(Math.round(100 * share));
        return (value < 0 && shown(value) ? "\u2212" : value > 0 && shown(value) ? "+" : "") + shown(value) + (spread ? " ±" + shown(spread) : "");
    }

    results.fourNumbers = function(scores) {
        const {make, translated} = window.loraTrainStudio.parts;
        return make("dl", {class: "ltr-numbers"}, ...NUMBERS.filter(([name]) => scores[name]).map(([name, words, good, help]) => {
            const {value} = scores[name], spread = scores[name].spread || 0;
            const kind = Math.abs(value) <= spread || !value ? "" : value * good > 0 ? "good" : "bad";
            return make("div", {title: translated(help), "data-kind": kind || null}, make("dt", {text: translated(words)}),
                make("dd", {text: number(scores[name])}));
        }));
    };

    /** What the form asks for; an empty field leaves it to the server. */
    function makeForm(app) {
        const {make, button, field, tick, textBox, translated} = window.loraTrainStudio.parts;
        const values = {weights: "", seeds: "", prompts: "", checkpoint: "", extras: new Set(), saves: new Set()};
        const prompts = make("textarea", {
            class: "lts-input", rows: "3", id: "lora_train_grid_prompts", spellcheck: "false",
            placeholder: translated("One a line; empty takes captions of held-out pictures"), oninput: () => (values.prompts = prompts.value),
        });
        const saves = make("div", {class: "ltr-choices"});
        const numbers = (text) => (text.trim() ? text.split(/[\s,;]+/).filter(Boolean).map(Number) : null);
        const lines = (text) => text.split("\n").map((line) => line.trim()).filter(Boolean);
        const element = make("details", {class: "ltr-form"}, make("summary", {text: translated("What is painted")}),
            make("div", {class: "lts-line"},
                field("Weights", textBox("", (text) => (values.weights = text), {placeholder: "0.7, 1", id: "lora_train_grid_weights"}),
                    "How strongly the LoRA is applied, as in <lora:name:0.7>."),
                field("Seeds", textBox("", (text) => (values.seeds = text), {placeholder: "1000, 1001, 1002", id: "lora_train_grid_seeds"}),
                    "At least three show how far the numbers spread."),
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
            saves.replaceChildren(...usable.map((save) => tick(results.saveName(save), false,
                (on) => values.saves[on ? "add" : "delete"](save.id))));
        }

        /** The request, without what was left empty. */
        function wish() {
            const asked = {
                weights: numbers(values.weights), seeds: numbers(values.seeds), prompts: lines(values.prompts),
                checkpoint: values.checkpoint.trim(), extras: [...values.extras], saves: [...values.saves],
            };
            return Object.fromEntries(Object.entries(asked).filter(([, value]) => value && value.length));
        }

        return {element, draw, wish};
    }

    results.grid = function(app) {
        const {make, button, choice, pills, translated} = window.loraTrainStudio.parts;
        const form = makeForm(app), notes = make("div", {class: "ltr-notes"}), picker = make("div", {class: "lts-line lts-go"});
        const table = make("div", {class: "ltr-grid", role: "table", "aria-label": translated("Grid of saves and weights")});
        const paint = button("Paint the grid", () => results.paint(app), {drawn: "picture", id: "lora_train_paint_grid"});
        const element = make("div", {class: "ltr-section", hidden: true},
            make("div", {class: "ltr-line"}, make("h4", {text: translated("Saves and weights")}), paint), form.element, notes, picker, table);
        let known = "", prompt = 0, places = [];

        results.paint = (asking) => asking.start("results/grid", {run: asking.found.run, ...form.wish()});

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
            const name = save ? results.saveName(save) : translated("Average of the last saves");
            return part ? name + ", " + translated(part) : name;
        }

        const cellsOf = (grid, column) => grid.cells.filter((cell) => cell.column === column && cell.prompt === prompt);

        function tile(found, row, column, cell, place) {
            if (!cell.done) return make("span", {class: "ltr-cell", title: translated("Not painted yet")});
            const image = make("img", {alt: ""}), title = `${row.name} · ${results.weight(column.weight)} · ${translated("seed")} ${cell.seed}`;
            app.page.pictures.showInSight(image, app.address(cell.file, true));
            return make("button", {
                type: "button", class: "ltr-cell", title, "aria-label": title, onclick: () => app.page.zoom(places, ...place),
            }, image);
        }

        /** Everything that can be seen in full size, a row of the page each. */
        function zoomable(found, list) {
            return list.map((row) => row.columns.flatMap((column) => cellsOf(found.grid, column.index).map((cell) => (cell.done ? {
                path: app.address(cell.file, false), small: app.address(cell.file, true),
                title: row.save === BASE ? row.name : `${row.name} · ${results.weight(column.weight)}`,
                about: `${translated("seed")} ${cell.seed} · ${found.grid.prompts[prompt].text}`,
            } : null))));
        }

        function drawTable(found) {
            const list = rows(found), {grid} = found, best = found.recommended;
            places = zoomable(found, list);
            table.replaceChildren(...list.map((row, number) => {
                let place = 0;
                return make("div", {class: "ltr-row", role: "row"}, make("div", {class: "ltr-row-name", role: "rowheader"}, make("b", {text: row.name})),
                    make("div", {class: "ltr-row-cells"}, ...row.columns.map((column) => {
                        const scores = results.scoresOf(grid, column.index);
                        const chosen = best && best.save === row.save && !column.part && Math.abs(best.weight - column.weight) < 1e-6;
                        return make("div", {class: "ltr-column", role: "cell", "data-best": Boolean(chosen)},
                            row.save === BASE ? null : make("span", {class: "ltr-weight", text: results.weight(column.weight) +
                                (chosen ? " · " + translated("recommended") : "")}),
                            column.problem ? make("small", {class: "ltr-problem", text: column.problem}) :
                                make("div", {class: "ltr-cells"}, ...cellsOf(grid, column.index).map((cell) =>
                                    tile(found, row, column, cell, [number, place++]))),
                            scores && row.save !== BASE ? results.fourNumbers(scores) : null);
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
            }, {id: "lora_train_grid_prompt", label: "Prompt"}));
        }

        function draw() {
            const {found} = app;
            element.hidden = !found || !found.saves.some((save) => save.exists);
            if (element.hidden) return;
            form.draw(found);
            const {grid} = found, part = grid && grid.progress.done < grid.progress.total;
            paint.disabled = app.working();
            paint.lastChild.textContent = translated(part ? "Go on painting" : grid ? "Paint it anew" : "Paint the grid");
            const now = JSON.stringify([found.run, grid, found.recommended, found.saves]);
            if (now === known) return;
            known = now;
            const said = grid ? [...grid.notes, ...(grid.error ? [grid.error] : [])] : [];
            notes.replaceChildren(...said.map((text) => make("p", {class: "lts-quiet", text})));
            table.hidden = picker.hidden = !grid;
            if (!grid) return;
            drawPicker(found);
            drawTable(found);
        }

        return {element, draw};
    };

    /** The four numbers of a column of the grid; null where it was not scored. */
    results.scoresOf = (grid, column) => {
        const scores = grid.scores[column];
        return scores && Object.keys(scores).length ? scores : null;
    };
})(window.loraTrainResults = window.loraTrainResults || {});
