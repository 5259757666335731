/* The saves of a run on the page "3 Results": each with its picture and by how much it is better than the base model; taken, sent,
 * copied, compared, deleted.
 */
(function(results) {
    "use strict";

    results.weight = (weight) => String(Math.round(100 * weight) / 100);

    /** By its epoch, unless that has several saves. */
    results.saveName = (app, save) => {
        const {translated} = window.loraTrainStudio.parts;
        return byEpoch(app, save) ? translated`epoch ${save.epoch}` : translated`step ${save.step}`;
    };

    function byEpoch(app, save) {
        const alone = app.found.saves.every((one) => one.epoch !== save.epoch || one.step === save.step);
        return Boolean(alone && save.epoch);
    }

    /** A picture of a save that opens in full size; null where there is none. */
    results.picture = function(app, save) {
        const {make} = window.loraTrainStudio.parts;
        if (!save || !save.preview) return null;
        const image = make("img", {alt: ""}), title = results.saveName(app, save);
        app.page.pictures.showInSight(image, app.address(save.preview, true));
        return make("button", {
            type: "button", class: "ltr-picture", "aria-label": title, title,
            onclick: () => app.page.zoom([[{
                path: app.address(save.preview, false), small: app.address(save.preview, true), title,
            }]], 0, 0),
        }, image);
    };

    function wish(app, save, weight) {
        const {found} = app, first = (found.samples || [])[0];
        // The one that was taken is called as the LoRA.
        const text = save.is_result && found.result ? found.result.lora_text : save.lora_text;
        return {
            lora_text: text.replace(/:[\d.]+>$/, ":" + results.weight(weight) + ">"), trigger_word: found.trigger_word,
            others: found.saves.map((one) => one.lora_text), width: found.size && found.size[0], height: found.size && found.size[1],
            prompt: first ? first.prompt.replace(/ --[a-z] .*$/, "") : "",
        };
    }

    /** The result, once taken, is called as the LoRA; otherwise the save by its own name. */
    results.send = (app, save, weight) => app.page.sender.send(wish(app, save, weight));

    results.take = (app, save, weight) => app.act(
        () => app.page.api.ask("results/take", {run: app.found.run, save: save.id, weight: Math.round(100 * weight) / 100}),
        (taken) => {
            const {sender} = app.page, others = app.found.saves.map((one) => one.lora_text);
            sender.refreshCards();
            app.say(taken.message, false, sender.possible() ? ["Send to txt2img", () => sender.send({
                ...taken, others, trigger_word: app.found.trigger_word,
            })] : null);
        });

    /** How much better than the base model a save was when it was measured, on held-out pictures where there are some. */
    function betterOf(found, save) {
        const entry = found.measured.find((one) => one.step === save.step);
        if (!entry) return null;
        return entry.better[entry.held_out.length ? "held_out" : "training"][0];
    }

    results.saves = function(app) {
        const {make, button, count, translated} = window.loraTrainStudio.parts;
        const element = make("div", {class: "ltr-section", hidden: true}), chosen = new Set();
        let known = "";

        /** What shows a save in full size. */
        const shown = (save, file, about) => ({
            path: app.address(file, false), small: app.address(file, true), title: results.saveName(app, save), about,
        });

        /** For each prompt of the samples and of the grid, the pictures of these saves; prompts that show one at most are left out. */
        function comparable(saves) {
            const {samples, grid} = app.found;
            const sampled = samples.map(({prompt, pictures}) => saves.map((save) => {
                const found = pictures.find((one) => one.step === save.step);
                return found ? shown(save, found.file, prompt) : null;
            }));
            const painted = grid ? grid.prompts.map(({text}, prompt) => saves.map((save) => {
                const cells = grid.cells.filter((cell) => cell.done && cell.prompt === prompt && cell.seed === grid.seeds[0] &&
                    grid.columns[cell.column].save === save.id && !grid.columns[cell.column].part);
                const away = (cell) => Math.abs(grid.columns[cell.column].weight - 1);
                const found = cells.sort((a, b) => away(a) - away(b))[0];
                return found ? shown(save, found.file, text) : null;
            })) : [];
            return [...painted, ...sampled].filter((row) => row.filter(Boolean).length > 1);
        }

        function remove(saves) {
            const names = saves.map((save) => results.saveName(app, save)).join(", ");
            if (!window.confirm(translated("Delete these files?") + "\n" + names)) return null;
            return app.act(() => app.page.api.ask("results/delete", {run: app.found.run, saves: saves.map((save) => save.id)}), () => {
                chosen.clear();
                app.say(translated`Deleted: ${names}`);
            });
        }

        function head() {
            const saves = app.found.saves.filter((save) => save.exists), marked = saves.filter((save) => chosen.has(save.id));
            const rows = comparable(marked);
            return make("div", {class: "ltr-line"}, make("h4", {text: count(saves.length, "save")}),
                marked.length ? button(translated`Compare ${marked.length}`, () => app.page.zoom(
                    rows, 0, rows[0].findIndex(Boolean), {beside: true}), {
                    drawn: "split", id: "lora_train_compare", disabled: !rows.length,
                    title: rows.length ? "Their pictures side by side" : marked.length < 2 ? "Mark another one to compare with" :
                        "There are no pictures of several of them; paint the grid with them",
                }) : null,
                marked.length ? button(translated`Delete ${marked.length}`, () => remove(marked), {
                    drawn: "remove", id: "lora_train_delete",
                }) : make("span", {class: "lts-quiet", text: saves.length > 1 ? translated("Mark some to compare them") : ""}));
        }

        function card(save) {
            const {found} = app, {percent} = window.loraTrainChart, better = betterOf(found, save), name = results.saveName(app, save);
            const best = found.recommended && found.recommended.save === save.id;
            const weight = best ? found.recommended.weight : 1;
            const mark = make("input", {
                type: "checkbox", class: "ltr-mark", checked: chosen.has(save.id), disabled: !save.exists, "aria-label": translated`Mark ${name}`,
                onchange: (event) => {
                    chosen[event.target.checked ? "add" : "delete"](save.id);
                    known = "";
                    draw();
                },
            });
            const tool = (words, drawn, press, disabled) => button(words, press, {kind: "tool", drawn, disabled});
            return make("div", {class: "ltr-save", role: "listitem", "data-save": save.id, "data-best": best, "data-gone": !save.exists},
                make("div", {class: "ltr-face"}, results.picture(app, save) || make("span", {class: "ltr-picture ltr-blank", text: name}), mark),
                make("div", {class: "ltr-line"}, make("b", {text: name}), better === null ? null : make("span", {
                    class: "ltr-better", "data-good": better > 0, text: percent(better),
                    title: translated("How much lower its loss is than that of the base model, on the same pictures with the same noise."),
                })),
                make("small", {text: [byEpoch(app, save) ? translated`step ${save.step}` : translated`epoch ${save.epoch}`, save.is_result && translated("the LoRA"),
                    best && translated("recommended"), !save.exists && translated("deleted")].filter(Boolean).join(" · ")}),
                save.exists ? make("div", {class: "ltr-tools"},
                    button("Take this one", () => results.take(app, save, weight), {disabled: save.is_result && !best, title: save.is_result && !best ?
                        "It is the LoRA already." : "Make this save the LoRA, with a card."}),
                    app.page.sender.possible() ? tool("Send to txt2img", "right", () => results.send(app, save, weight)) : null,
                    tool("Copy LoRA text", "copy", () => app.page.sender.copy(wish(app, save, weight))),
                    tool("Share", "upload", () => app.share(save)),
                    tool("Delete", "remove", () => remove([save]), save.is_result)) : null);
        }

        function draw() {
            const {found} = app;
            element.hidden = !found || !found.saves.length;
            if (element.hidden) return;
            const now = JSON.stringify([found.run, found.saves, found.measured, found.recommended, found.samples, found.grid && found.grid.progress, [...chosen]]);
            if (now === known) return;
            known = now;
            for (const id of chosen) {
                if (!found.saves.some((save) => save.id === id && save.exists)) chosen.delete(id);
            }
            const focused = document.activeElement && element.contains(document.activeElement) && document.activeElement.closest("[data-save]");
            element.replaceChildren(head(), make("div", {class: "ltr-saves", role: "list"}, ...found.saves.map(card)));
            const again = focused && element.querySelector(`[data-save="${CSS.escape(focused.dataset.save)}"] .ltr-mark`);
            if (again) again.focus();
        }

        return {element, draw};
    };
})(window.loraTrainResults = window.loraTrainResults || {});
