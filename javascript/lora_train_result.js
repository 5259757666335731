/* What may be done with a run's LoRA on the page "2 Train": sent to txt2img with its size, copied, looked at among the results. Any
 * file that the run saved can be chosen. lora_train.js says when the status has changed.
 */
(function() {
    "use strict";

    /** `page` has byId, button and translated of lora_train.js, `sender` is that of lora_train_send.js, `showResults` turns to a
     * run's results. Returns {draw(status)}. */
    window.loraTrainResult = function({byId, button, translated}, sender, showResults) {
        const which = document.createElement("select");
        which.id = "lora_train_which";
        which.className = "lora-train-which";
        which.title = translated("Which of the saved files");
        const row = byId("lora_train_result_buttons");
        row.prepend(which);
        button("lora_train_send").addEventListener("click", () => sender.send(wish()));
        button("lora_train_copy").addEventListener("click", () => sender.copy(wish()));
        button("lora_train_see_results").addEventListener("click", () => showResults(status.run));
        let status = null, choices = "";

        /** The run's files, the result first and then the newest. */
        const files = () => (status ? status.saved.slice().reverse().sort((a, b) => b.final - a.final) : []);
        const nameOf = (file) => file.lora_text.replace(/^<lora:|:1>$/g, "");

        function wish() {
            const saved = files(), chosen = saved[which.selectedIndex] || saved[0];
            const [width, height] = status.planned ? status.planned.resolution.split("×") : [];
            return {
                lora_text: chosen ? chosen.lora_text : "", trigger_word: status.trigger_word, width, height,
                others: saved.map((file) => file.lora_text),
            };
        }

        function draw(answer) {
            status = answer;
            const saved = files(), now = JSON.stringify([answer.run, saved]);
            if (now !== choices) {
                choices = now;
                which.replaceChildren(...saved.map((file) => {
                    const made = document.createElement("option");
                    made.textContent = nameOf(file) + (file.final ? "" : " · " + translated`epoch ${file.epoch} · step ${file.step}`);
                    return made;
                }));
            }
            which.classList.toggle("lora-train-hidden", saved.length < 2);
            row.classList.toggle("lora-train-hidden", answer.running || !saved.length);
            button("lora_train_send").classList.toggle("lora-train-hidden", !sender.possible());
            sender.refreshDue();
        }

        return {draw};
    };
})();
