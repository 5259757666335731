/* What the tab shows of a run besides its curve: the bar, the speed, how it ended, the files and the warnings. lora_train.js
 * asks for the status and says when to draw.
 */
(function() {
    "use strict";

    function element(tag, className, text) {
        const made = document.createElement(tag);
        if (className) made.className = className;
        if (text !== undefined) made.textContent = text;
        return made;
    }

    /** Fills two empty elements of the page, beside the fields and below them. Returns the elements that were made, with
     * draw(status) and showProblem(text). */
    window.loraTrainProgress = function(live, drawn, translated) {
        const view = {draw, showProblem};
        live.className = drawn.className = "lora-train-live";
        view.head = element("div", "lora-train-head");
        view.name = view.head.appendChild(element("b"));
        view.name.translate = false;
        view.speed = view.head.appendChild(element("span"));
        view.barFrame = element("div", "progressDiv");
        view.bar = view.barFrame.appendChild(element("div", "progress"));
        view.waiting = element("div", "lora-train-waiting");
        view.waiting.setAttribute("role", "alert");
        view.waitingText = view.waiting.appendChild(element("span", "lora-train-resume-text lora-train-problem"));
        view.choose = view.waiting.appendChild(element("button", "", translated("Choose it")));
        view.choose.id = "lora_train_choose_model";
        view.choose.title = translated("Load that checkpoint, so that the run goes on.");
        view.outcome = element("div", "lora-train-outcome");
        view.outcome.setAttribute("role", "status");
        view.resume = element("div", "lora-train-resume");
        view.result = element("div", "lora-train-file");
        view.others = element("details", "lora-train-others");
        view.othersCount = view.others.appendChild(element("summary"));
        view.othersList = view.others.appendChild(element("div"));
        view.curve = element("div", "lora-train-curve");
        view.strip = element("div", "lora-train-samples");
        view.warnings = element("ul", "lora-train-warnings");
        live.append(view.head, view.barFrame, view.waiting, view.outcome, view.resume, view.result, view.others);
        drawn.append(view.curve, view.strip, view.warnings);
        for (const part of [...live.children, ...drawn.children]) part.hidden = true;
        return view;

        function draw(answer) {
            view.speed.textContent = speedText(answer);
            view.barFrame.hidden = !answer.running;
            if (answer.running) drawBar(answer);
            drawWaiting(answer);
            drawOutcome(answer);
            drawFiles(answer);
            drawList(view.warnings, answer.warnings);
        }

        function speedText(answer) {
            const step = answer.step, parts = [];
            if (!step) return "";
            if (step.average_loss !== null) parts.push(translated`loss ${step.average_loss.toPrecision(3)}`);
            if (answer.running && step.steps_per_second) parts.push(rate(step.steps_per_second));
            return parts.join(" · ");
        }

        function rate(perSecond) {
            return perSecond >= 1 ? translated`${perSecond.toFixed(1)} it/s` : translated`${(1 / perSecond).toFixed(1)} s/it`;
        }

        function drawBar(answer) {
            let fraction = answer.fraction, text = translated("Starting");
            if (answer.waiting) {
                text = translated("Waiting for other work");
            } else if (answer.stage && !answer.stage.checkpoint) {
                fraction = answer.stage.total ? answer.stage.done / answer.stage.total : 0;
                text = translated(answer.stage.name) + (answer.stage.total ? " " + answer.stage.done + "/" + answer.stage.total : "");
            } else if (answer.step) {
                const step = answer.step;
                text = step.step + "/" + step.total + " · " + translated`epoch ${step.epoch}/${step.epochs}`;
            }
            if (answer.seconds_left !== null && !answer.stage && !answer.waiting) {
                // Before steps were measured it is an estimate.
                const time = duration(answer.seconds_left), measured = answer.step && answer.step.seconds_left !== null;
                text += " · " + (measured ? translated`${time} left` : translated`about ${time} left`);
            }
            if (answer.stopping) text = translated(answer.stopping === "save" ? "Stopping and saving" : "Stopping");
            view.bar.style.width = (100 * fraction).toFixed(1) + "%";
            view.bar.style.background = fraction > 0 ? "" : "transparent";
            view.bar.textContent = text;
        }

        /** That the run stands still until the user does something is no matter of the bar. */
        function drawWaiting(answer) {
            const stage = answer.running && answer.stage && answer.stage.checkpoint ? answer.stage : null;
            view.waiting.hidden = !stage;
            if (!stage) return;
            const {step} = answer, name = translated(stage.name);
            const text = step ? translated`${name}. The run stands still at step ${step.step}/${step.total}.` :
                translated`${name}. The run stands still at its start.`;
            // An alert is read out when its text changes.
            if (view.waitingText.textContent !== text) view.waitingText.textContent = text;
            // The WebUI's own way to load a checkpoint.
            view.choose.hidden = typeof selectCheckpoint !== "function";
            view.choose.onclick = () => selectCheckpoint(stage.checkpoint);
        }

        function duration(seconds) {
            const whole = Math.round(seconds), two = (number) => String(number).padStart(2, "0");
            const hours = Math.floor(whole / 3600), minutes = Math.floor(whole / 60) % 60;
            return hours ? hours + ":" + two(minutes) + ":" + two(whole % 60) : minutes + ":" + two(whole % 60);
        }

        function drawOutcome(answer) {
            const finished = answer.finished;
            view.outcome.hidden = !finished;
            view.outcome.classList.toggle("lora-train-problem", Boolean(
                finished && (finished.outcome === "failed" || finished.verdict === "ruined")));
            // The verdict has a line of its own.
            const verdict = answer.diagnosed ? answer.diagnosed.message : "";
            view.outcome.textContent = finished ? translated(finished.message.replace(verdict, "").trim()) : "";
        }

        function showProblem(text) {
            view.outcome.hidden = false;
            view.outcome.classList.add("lora-train-problem");
            view.outcome.textContent = translated(text);
        }

        /** The result, or the newest file until there is one; the others folded below it, newest first. */
        function drawFiles(answer) {
            const saved = answer.saved, message = answer.finished ? answer.finished.message : "";
            const [first, ...others] = saved.slice().reverse().sort((a, b) => b.final - a.final);
            view.result.hidden = !first;
            view.others.hidden = !others.length;
            const shown = [message, ...saved.map((entry) => entry.path)].join("\n");
            if (!first || view.result.dataset.shown === shown) return;
            view.result.dataset.shown = shown;
            // The last message usually names the file already.
            view.result.replaceChildren(...fileParts(first).slice(0, message.includes(first.path) ? 1 : 2));
            view.othersCount.textContent = translated`Also saved: ${others.length}`;
            view.othersList.replaceChildren(...others.map((entry) => {
                const row = element("div", "lora-train-file");
                row.append(...fileParts(entry));
                return row;
            }));
        }

        function fileParts(entry) {
            const parts = [element("code", "", entry.lora_text), element("span", "", entry.path)];
            for (const part of parts) part.translate = false;
            return parts;
        }

        function drawList(list, texts) {
            list.hidden = !texts.length;
            if (list.dataset.shown === texts.join("\n")) return;
            list.dataset.shown = texts.join("\n");
            list.replaceChildren(...texts.map((text) => element("li", "", translated(text))));
        }
    };
})();
