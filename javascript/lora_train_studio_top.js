/* The head of the page "1 Dataset": which dataset, undo, redo and save; the five steps with the next one marked; the bar of
 * work in progress.
 */
(function(studio) {
    "use strict";
    /** What a look at a picture would settle; captions and crops have steps of their own. */
    const NEW = "\u0000new";

    const sum = (counts, codes) => codes.reduce((all, code) => all + ((counts || {})[code] || 0), 0);

    /** The five steps: what each says, whether it is done, and which comes next. */
    function steps(app) {
        const {count, translated} = studio.parts, dataset = app.dataset(), view = app.view;
        const report = dataset.report, counts = report ? report.counts : {}, pictures = dataset.pictures;
        const look = report ? report.to_look_at : 0, deep = sum(counts, ["deep_crop", "narrow"]);
        const shaped = dataset.shaped || view.shown.pictures.filter((picture) => picture.shaped).length;
        const checked = Boolean(report), captioned = pictures > 0 && view.empty === 0;
        const made = [
            {id: "add", name: "Pictures", drawn: "add", done: pictures > 0, about: count(pictures, "picture")},
            {
                id: "check", name: "Check", drawn: "search", done: checked && report.fresh, look: checked && look > 0,
                about: !checked ? "" : !report.fresh ? translated("Changed since") :
                    look ? translated`${look} to look at` : translated("All fine"),
            },
            {
                id: "shape", name: "Crop", drawn: "crop", done: shaped > 0 || (checked && !deep),
                about: deep && !shaped ? count(deep, "deep crop") :
                    translated(shaped ? "Done" : checked ? "Not needed" : "Size and crop"),
            },
            {
                id: "caption", name: "Caption", drawn: "caption", done: captioned,
                about: captioned ? translated("Done") : view.empty ? translated`${view.empty} without` : "",
            },
            {id: "train", name: "Train", drawn: "train", done: false, about: report && report.proposal ?
                count(report.proposal.steps, "step") : ""},
        ];
        const next = !pictures ? "add" : !checked ? "check" : captioned ? "train" : made[2].done ? "caption" : "shape";
        return made.map((step) => ({...step, next: step.id === next}));
    }

    studio.steps = steps;

    /** Says that another dataset was opened elsewhere, and asks which one is to be shown here. */
    studio.elsewhere = function(app) {
        const {make, button, translated} = studio.parts;
        const element = make("div", {class: "lts-elsewhere", id: "lora_train_elsewhere", role: "alert", hidden: true});
        let known = "";

        /** What is written here is handed on first; when the dataset is open again it is sent once more. */
        async function back(name) {
            await app.written;
            return app.enter({name});
        }

        async function go() {
            await app.written;
            if (app.unsent.size && !window.confirm(translated("Leave without saving?"))) return;
            await app.act(() => app.move(() => null));
        }

        function words(mine, other) {
            if (!mine) return translated`${other.name} was opened in another page or by a program.`;
            return other ? translated`${mine.name} is no longer open: ${other.name} was opened in another page or by a program.` :
                translated`${mine.name} is no longer open: it was closed in another page or by a program.`;
        }

        function draw() {
            const mine = app.dataset(), other = app.elsewhere && app.elsewhere.dataset;
            const now = JSON.stringify([mine && mine.name, Boolean(app.elsewhere), other && other.name]);
            if (now === known) return;
            known = now;
            element.hidden = !app.elsewhere;
            if (!app.elsewhere) return;
            element.replaceChildren(
                make("p", {text: words(mine, other) + " " + translated("What you wrote here is kept.")}),
                make("div", {class: "lts-line lts-go"},
                    mine ? button(translated`Open ${mine.name}`, () => back(mine.name), {
                        kind: "primary", drawn: "back", id: "lora_train_reopen"}) : null,
                    button(other ? translated`Go to ${other.name}` : "Leave it", go, {id: "lora_train_follow"})));
        }

        return {element, draw};
    };

    studio.top = function(app) {
        const {make, button, choice, icon, count, translated} = studio.parts;
        const element = make("div", {class: "lts-top"}), progress = make("div", {class: "lts-progress", hidden: true});
        let known = "", left = null;

        function head(dataset) {
            const names = app.view.state.datasets.map(({name}) => name);
            if (!names.includes(dataset.name)) names.unshift(dataset.name);
            const options = [...names.map((name) => [name, name]), [NEW, translated("New dataset")]];
            const list = choice(options, dataset.name, (name) => {
                // Only a press of Save writes captions.
                const discard = dataset.unsaved > 0 &&
                    window.confirm(translated("Leave without saving?") + " " + count(dataset.unsaved, "changed caption"));
                if (dataset.unsaved && !discard) {
                    list.selectedIndex = names.indexOf(dataset.name);
                    return null;
                }
                app.panel = "";
                return name === NEW ? app.act(() => app.move(() => app.api.ask("close", {discard}))) : app.enter({name, discard});
            }, {id: "lora_train_dataset", label: "Dataset", own: true});
            const trigger = dataset.trigger_word;
            return make("div", {class: "lts-head"},
                make("div", {class: "lts-name"}, list,
                    trigger && trigger !== dataset.name ? make("span", {
                        class: "lts-trigger", translate: "no", text: trigger, title: translated("Trigger word"),
                    }) : null,
                    make("span", {class: "lts-quiet", text: count(dataset.pictures, "picture")})),
                make("div", {class: "lts-actions"}, ...historyButtons(dataset)));
        }

        function historyButtons(dataset) {
            const undo = button("Undo", () => app.act(() => app.api.ask("undo", {}), (a) => translated`Undone: ${translated(a.label)}`), {
                kind: "tool", drawn: "undo", id: "lora_train_undo", disabled: !dataset.can_undo,
                title: dataset.can_undo ? translated`Undo: ${translated(dataset.can_undo)} (Ctrl+Z)` : "Nothing to undo",
            });
            const redo = button("Redo", () => app.act(() => app.api.ask("redo", {}), (a) => translated`Redone: ${translated(a.label)}`), {
                kind: "tool", drawn: "redo", id: "lora_train_redo", disabled: !dataset.can_redo,
                title: dataset.can_redo ? translated`Redo: ${translated(dataset.can_redo)} (Ctrl+Y)` : "Nothing to redo",
            });
            const save = button("Save", app.save, {
                drawn: "save", id: "lora_train_save", disabled: !dataset.unsaved, title: "Write the changed captions (Ctrl+S)",
            });
            if (dataset.unsaved) {
                save.classList.add("lts-due");
                save.lastChild.textContent = translated`Save ${dataset.unsaved}`;
            }
            return [undo, redo, save];
        }

        const saved = (number) => translated`${count(number, "caption")} saved.`;

        app.save = async() => {
            // The caption that is being written belongs to what is saved.
            await app.written;
            if (!await app.resend()) return;
            const first = await app.act(() => app.api.ask("save", {}), ({written}) => saved(written));
            if (!first || !first.conflicts.length) return;
            const question = translated("Another program changed these captions meanwhile. Replace them?");
            const shown = first.conflicts.slice(0, 20).join(", ") + (first.conflicts.length > 20 ? ", …" : "");
            if (!window.confirm(question + "\n" + shown)) return;
            await app.act(() => app.api.ask("save", {overwrite: true}), ({written}) => saved(first.written + written));
        };

        function stepButton(step, number) {
            const drawn = step.look ? "warning" : step.done && !step.next ? "check" : step.drawn;
            const mark = make("span", {class: "lts-step-mark"}, icon(drawn));
            return make("button", {
                type: "button", class: "lts-step", id: "lora_train_step_" + step.id, "data-done": String(step.done),
                "data-next": String(step.next), "data-look": String(Boolean(step.look)),
                "aria-expanded": String(app.panel === step.id), "aria-current": step.next ? "step" : null,
                onclick: () => app.open(step.id),
            }, mark, make("span", {class: "lts-step-words"},
                make("b", {}, make("span", {class: "lts-number", text: number + " "}), translated(step.name)),
                make("small", {text: step.about})));
        }

        /** The work that goes on, and below it what the last work that met problems had to say, until that is closed. */
        function drawProgress() {
            const task = app.task();
            if (task && task.running) app.watched = task.id;
            if (task && !task.running && task.id === app.watched) {
                app.watched = null;
                if (task.outcome === "failed" || task.problems.length || !left) left = task;
            }
            const going = task && task.running ? task : null;
            progress.hidden = !app.uploading && !going && !left;
            progress.replaceChildren(...[
                app.uploading ? bar(app.uploaded || 0, app.uploading) : going ? bar(
                    going.total ? going.done / going.total : 0, taskText(going), button("Stop",
                        () => app.act(() => app.api.ask("stop-task", {})),
                        {id: "lora_train_stop_task", disabled: going.stopping})) : null,
                ...(left ? ended(left) : []),
            ].filter(Boolean));
        }

        function ended(task) {
            const more = task.more_problems ? [make("li", {text: "+ " + task.more_problems})] : [];
            return [make("div", {class: "lts-bar"},
                make("span", {class: "lts-said" + (task.outcome === "failed" ? " lts-problem" : ""), text: translated(task.message)}),
                button("Close", () => {
                    left = null;
                    drawProgress();
                }, {kind: "tool", drawn: "close"})),
            task.problems.length ? make("ul", {class: "lts-problems"}, ...task.problems.map((problem) => make("li", {},
                make("b", {translate: "no", text: problem.picture ? problem.picture + ": " : ""}), translated(problem.text))), ...more) : null];
        }

        function taskText(task) {
            const seconds = task.seconds_left, two = (number) => String(number).padStart(2, "0");
            const time = Math.floor(seconds / 60) + ":" + two(Math.floor(seconds % 60));
            const left = seconds === null ? "" : " · " + translated`${time} left`;
            if (task.stopping) return translated("Stopping");
            return translated(task.name) + (task.total ? " " + task.done + "/" + task.total : "") + left;
        }

        /** The WebUI's own bar, and what may be pressed beside it. */
        function bar(share, text, press) {
            const inner = make("div", {class: "progress", text: text});
            inner.style.width = (100 * Math.min(1, share)).toFixed(1) + "%";
            if (!share) inner.style.background = "transparent";
            return make("div", {class: "lts-bar"}, make("div", {class: "progressDiv"}, inner), press);
        }

        function draw() {
            const dataset = app.dataset();
            drawProgress();
            const made = dataset ? steps(app) : [];
            const now = JSON.stringify([dataset, made, app.panel, app.view.state && app.view.state.datasets]);
            if (now === known) return;
            known = now;
            element.hidden = !dataset;
            if (!dataset) return;
            element.replaceChildren(head(dataset),
                make("div", {class: "lts-steps"}, ...made.map((step, index) => stepButton(step, index + 1))));
        }

        return {element, progress, draw};
    };
})(window.loraTrainStudio = window.loraTrainStudio || {});
