/* The offer to go on with the newest run, where it was interrupted, stopped or failed and left a state to resume from: a
 * sentence and a button. lora_train.js says when to look.
 */
(function() {
    "use strict";

    /** `ask` asks the API; `started` is called after a press that was obeyed, `refused` with the sentence of one that was
     * not. Returns a function to be called with each status. */
    window.loraTrainResume = function(place, ask, started, refused, translated) {
        let known = null, run = null;
        const text = document.createElement("span"), press = document.createElement("button");
        text.className = "lora-train-resume-text";
        const name = text.appendChild(document.createElement("span")), told = text.appendChild(document.createElement("span"));
        name.translate = false;
        press.id = "lora_train_resume_it";
        press.textContent = translated("Resume");
        press.title = translated("Go on where that run left off, with the settings it had.");
        place.append(text, press);

        press.addEventListener("click", async () => {
            press.disabled = true;
            try {
                await ask("start", {resume: run.id});
                place.hidden = true;
                started();
            } catch (error) {
                refused(error.message);
            } finally {
                press.disabled = false;
            }
        });

        function draw() {
            place.hidden = !run;
            if (!run) return;
            const step = translated`step ${run.resume_step + (run.total ? "/" + run.total : "")}`;
            name.textContent = run.name;
            told.textContent = run.outcome === "interrupted" ? ": " + translated(run.message) : " · " + step;
        }

        return async function(answer) {
            const now = answer.run + (answer.running ? " running" : "");
            if (now === known) return;
            known = now;
            run = null;
            try {
                const newest = answer.running ? null : (await ask("runs")).runs[0];
                if (known === now && newest && newest.resume_step !== null &&
                    ["interrupted", "stopped", "failed"].includes(newest.outcome)) run = newest;
            } catch (error) {
                known = null;  // asked again with the next status
            }
            draw();
        };
    };
})();
