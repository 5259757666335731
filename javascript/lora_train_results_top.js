/* The head of the page "3 Results": which run, the work under way, what to do where there is nothing yet; the save to take; how
 * the run learnt.
 */
(function(results) {
    "use strict";
    const TRAIN = 1;

    /** "21 Nov, 12:00" of a run's id, which ends in the time of its start. */
    function when(id) {
        const found = /-(\d{4})(\d\d)(\d\d)-(\d\d)(\d\d)\d\d(-\d+)?$/.exec(id);
        if (!found) return "";
        const [year, month, day, hour, minute] = found.slice(1, 6).map(Number);
        return new Date(year, month - 1, day, hour, minute).toLocaleString(
            window.loraTrainLanguage.tag, {day: "numeric", month: "short", hour: "2-digit", minute: "2-digit"});
    }

    function duration(seconds) {
        const two = (number) => String(number).padStart(2, "0"), whole = Math.round(seconds);
        const hours = Math.floor(whole / 3600), minutes = Math.floor(whole / 60) % 60;
        return (hours ? hours + ":" + two(minutes) : minutes) + ":" + two(whole % 60);
    }

    results.head = function(app) {
        const {make, button, choice, translated} = window.loraTrainStudio.parts;
        const element = make("div", {class: "lts-head"}), progress = make("div", {class: "ltr-progress", hidden: true});
        const empty = make("div", {class: "ltr-empty", hidden: true});
        let known = "";

        const label = (run) => [run.name || run.id, when(run.id), {
            stopped: translated("stopped"), failed: translated("failed"), interrupted: translated("interrupted"),
            running: translated("running"),
        }[run.outcome]].filter(Boolean).join(" · ");

        async function report() {
            // No link could show the token; the page is put together here and shown from memory.
            await app.act(async() => {
                const blob = await app.page.api.blob("results/report?run=" + encodeURIComponent(app.found.run));
                const link = make("a", {href: URL.createObjectURL(blob), target: "_blank", rel: "noopener"});
                link.click();
                setTimeout(() => URL.revokeObjectURL(link.href), 60000);
            });
        }

        async function settings() {
            await app.act(async() => {
                const blob = await app.page.api.blob("settings/file?run=" + encodeURIComponent(app.found.run));
                window.loraTrainStudio.parts.offer(blob, app.found.run + ".toml");
            });
        }

        function drawHead() {
            const {runs, found} = app;
            element.hidden = !found;
            if (!found || !runs) return;
            const facts = [found.trigger_word && translated`trigger word: ${found.trigger_word}`].filter(Boolean);
            element.replaceChildren(
                make("div", {class: "lts-name"},
                    choice(runs.map((run) => [run.id, label(run)]), found.run, app.choose, {id: "lora_train_results_run", label: "Run", own: true}),
                    make("span", {class: "lts-quiet", text: facts.join(" · ")})),
                make("div", {class: "lts-actions"}, button("Open report", report, {
                    drawn: "caption", id: "lora_train_results_report",
                    title: "Curves, pictures, settings and verdict of this run on one page, to keep or to show.",
                }), button("Save settings", settings, {
                    drawn: "save", id: "lora_train_results_settings",
                    title: "The settings of this run as a TOML file: drop it on the page 2 Train to use them again.",
                })));
        }

        function drawEmpty() {
            const none = Boolean(app.runs && !app.runs.length);
            empty.hidden = !none;
            if (!none || empty.firstChild) return;
            empty.append(make("b", {text: translated("No training yet")}),
                make("p", {text: translated("What a training makes is shown here: its pictures, its saves, and which one to take.")}),
                button("Train a LoRA", () => app.page.turnTo(TRAIN), {kind: "primary", drawn: "train", id: "lora_train_results_begin"}));
        }

        function drawProgress() {
            const task = app.task, going = task && task.running;
            progress.hidden = !going;
            if (!going) return;
            const share = task.total ? task.done / task.total : 0;
            const left = task.seconds_left === null || task.seconds_left === undefined ? "" :
                " · " + translated`${duration(task.seconds_left)} left`;
            const count = task.total ? " " + task.done + "/" + task.total : "";
            const inner = make("div", {class: "progress", text: task.stopping ? translated("Stopping") : translated(task.name) + count + left});
            inner.style.width = (100 * Math.min(1, share)).toFixed(1) + "%";
            if (!share) inner.style.background = "transparent";
            progress.replaceChildren(make("div", {class: "lts-bar"}, make("div", {class: "progressDiv"}, inner),
                button("Stop", () => app.act(() => app.page.api.ask("results/stop", {})), {
                    id: "lora_train_results_stop", disabled: task.stopping, title: "What is painted stays; the grid can be gone on with.",
                })));
        }

        function draw() {
            drawProgress();
            drawEmpty();
            const now = JSON.stringify([app.runs, app.found && [app.found.run, app.found.trigger_word]]);
            if (now === known) return;
            known = now;
            drawHead();
        }

        return {element, progress, empty, draw};
    };

    /** The one to take, with the reason: what this page is for. */
    results.recommended = function(app) {
        const {make, button, translated} = window.loraTrainStudio.parts;
        const element = make("div", {class: "ltr-best", hidden: true});
        const verdict = window.loraTrainVerdict(app.page);
        let known = "";

        const judged = ({grid}) => Boolean(grid && grid.scores.some((scores) => scores.save && scores.likeness.mean !== null));

        /** What the offer is, by what is known so far. */
        function offer(found) {
            const best = found.recommended, save = best && found.saves.find((one) => one.id === best.save);
            if (best && save) {
                return {
                    title: translated`Recommended: ${results.saveName(app, save)} at ${results.weight(best.weight)}` + (save.is_result ? " · " + translated("the LoRA") : ""),
                    text: translated(best.reason), save, weight: best.weight, paint: !judged(found), words: "Paint the grid to be surer",
                };
            }
            const grid = found.grid, usable = found.saves.filter((one) => one.exists);
            if (!usable.length) {
                return {title: translated("Nothing is saved yet"), text: translated("As soon as the run saves a LoRA, it can be compared and taken here.")};
            }
            return {
                title: translated("Which save is the best?"), paint: true,
                text: grid && grid.progress.done < grid.progress.total ?
                    translated`The grid is painted in part: ${grid.progress.done} / ${grid.progress.total}.` :
                    translated("Paint the same pictures with each save, and judge them: likeness, prompt, drift and copies."),
                words: grid ? "Go on painting" : "Paint the grid",
            };
        }

        function draw() {
            const {found} = app;
            element.hidden = !found;
            if (!found) return;
            const now = JSON.stringify([found.run, found.recommended, found.saves, found.diagnosed, found.grid && [found.grid.progress, judged(found)], app.working()]);
            if (now === known) return;
            known = now;
            verdict.draw(found.diagnosed);
            const made = offer(found), best = made.save, words = make("div", {class: "ltr-best-words"},
                make("h4", {text: made.title}), make("p", {class: "ltr-reason", text: made.text || ""}));
            const line = make("div", {class: "lts-line lts-go"});
            if (best) {
                line.append(...[
                    button("Take this one", () => results.take(app, best, made.weight), {
                        kind: "primary", drawn: "check", id: "lora_train_take", disabled: !best.exists,
                        title: "Make this save the LoRA, with a card: preview picture, activation text, preferred weight.",
                    }),
                    button("Share", () => app.share(best), {drawn: "upload", id: "lora_train_share_best", disabled: !best.exists,
                        title: "Export it for Civitai, or push it to the Hugging Face hub."}),
                    app.page.sender.possible() ? button("Send to txt2img", () => results.send(app, best, made.weight), {
                        id: "lora_train_send_best", title: "Put the trigger word and the LoRA into the prompt of txt2img, at the size it was trained at.",
                    }) : null].filter(Boolean));
            }
            if (made.paint) {
                line.append(button(made.words, () => results.paint(), {
                    kind: best ? "plain" : "primary", drawn: "picture", id: "lora_train_paint", disabled: app.working(),
                    title: "Paint the same pictures with each save, and judge them: likeness, prompt, drift and copies.",
                }));
            }
            words.append(line);
            element.replaceChildren(...[results.picture(app, best), words].filter(Boolean), verdict.element);
        }

        return {element, draw};
    };

    /** The curve and the pictures on the way, as the page "2 Train" shows them while the run goes on. */
    results.learnt = function(app) {
        const {make, translated} = window.loraTrainStudio.parts;
        const frame = make("div", {class: "lora-train-curve"}), strip = make("div", {class: "lora-train-samples"});
        const element = make("details", {class: "ltr-section", open: true, hidden: true},
            make("summary", {text: translated("How it learnt")}), frame, strip);
        const curve = window.loraTrainCurve(frame, translated), drawStrip = window.loraTrainStrip(strip, app.page);
        let known = "";

        function draw() {
            const {found} = app;
            element.hidden = !found || (frame.hidden && strip.hidden && Boolean(known));
            if (!found) return;
            const now = JSON.stringify([found.run, found.steps, found.measured, found.samples, found.saves.length]);
            if (now === known) return;
            known = now;
            curve.draw({
                points: found.steps.map(([step, loss]) => [step, loss]), rates: found.steps.map((entry) => [entry[0], entry[3]]),
                measured: found.measured, saves: found.saves.map((save) => save.step),
            });
            drawStrip(found.run, found.samples);
            element.hidden = frame.hidden && strip.hidden;
        }

        return {element, draw};
    };
})(window.loraTrainResults = window.loraTrainResults || {});
