/* What may be done with a run's LoRA: sent to txt2img with its size, copied, shown among the WebUI's cards. Any file that the
 * run saved can be chosen. lora_train.js says when the status has changed.
 */
(function() {
    "use strict";

    /** `page` has byId, button, setText and translated of lora_train.js. Returns {draw(status),
     * refreshCards()}. */
    window.loraTrainResult = function(page) {
        const {byId, button, setText, translated} = page;
        const which = document.createElement("select");
        which.id = "lora_train_which";
        which.className = "lora-train-which";
        which.title = translated("Which of the saved files");
        const row = byId("lora_train_result_buttons");
        row.prepend(which);
        button("lora_train_send").addEventListener("click", send);
        button("lora_train_copy").addEventListener("click", copy);
        let status = null, choices = "", due = false;

        /** The run's files, the result first and then the newest. */
        const files = () => (status ? status.saved.slice().reverse().sort((a, b) => b.final - a.final) : []);
        const nameOf = (file) => file.lora_text.replace(/^<lora:|:1>$/g, "");
        const promptBox = () => byId("txt2img_prompt") && byId("txt2img_prompt").querySelector("textarea");

        function loraText() {
            const chosen = files()[which.selectedIndex] || files()[0];
            return chosen ? chosen.lora_text : "";
        }

        /** The trigger word as prompts need it: brackets are plain text in training, and there change the weight. */
        const trigger = () => status.trigger_word.replace(/\\?([()[\]])/g, "\\$1");

        /** Whether a prompt has the word, not only inside of another one or in the name of a LoRA. */
        function says(prompt, word) {
            const exactly = word.replace(/[.*+?^${}()|[\]\\/]/g, "\\$&"), other = "[^\\p{L}\\p{N}_]";
            return new RegExp(`(^|${other})${exactly}($|${other})`, "iu").test(prompt.replace(/<[^>]*>/g, " "));
        }

        function draw(answer) {
            status = answer;
            const saved = files(), now = JSON.stringify([answer.run, saved]);
            if (now !== choices) {
                choices = now;
                which.replaceChildren(...saved.map((file) => {
                    const made = document.createElement("option");
                    made.textContent = nameOf(file) + (file.final ? "" : " · " + translated("epoch") + " " + file.epoch + " · " +
                        translated("step") + " " + file.step);
                    return made;
                }));
            }
            which.classList.toggle("lora-train-hidden", saved.length < 2);
            row.classList.toggle("lora-train-hidden", answer.running || !saved.length);
            button("lora_train_send").classList.toggle("lora-train-hidden", !promptBox());
            if (due) refreshCards();
        }

        /** After a file was written: let the WebUI's LoRA cards show it. Its own refresh fails while it holds no model. */
        function refreshCards() {
            const refresh = byId("txt2img_lora_extra_refresh_internal");
            due = !status.model;
            if (refresh && !due) refresh.dispatchEvent(new Event("click"));
        }

        function send() {
            const box = promptBox();
            if (!box) return;
            const chosen = loraText(), begin = (lora) => lora.replace(/1>$/, "");
            let text = box.value.replace(/[\s,]+$/, "");
            // It takes the place of any file of this run, with the weight that stands there.
            for (const {lora_text} of files()) text = text.split(begin(lora_text)).join(begin(chosen));
            const missing = [says(text, trigger()) ? "" : trigger(), text.includes(begin(chosen)) ? "" : chosen];
            text = [text, ...missing].filter(Boolean).join(", ");
            setText(box, text);
            const size = status.planned ? status.planned.resolution.split("×") : [];
            ["width", "height"].forEach((side, index) => {
                const number = byId("txt2img_" + side) && byId("txt2img_" + side).querySelector("input[type=number]");
                if (number && size[index]) setText(number, size[index]);
            });
            refreshCards();
            if (typeof switch_to_txt2img === "function") switch_to_txt2img();
        }

        function copy() {
            const text = [trigger(), loraText()].filter(Boolean).join(", ");
            // Without https there is no clipboard but on localhost; then the text is there to be read and copied.
            if (navigator.clipboard) {
                navigator.clipboard.writeText(text);
            } else {
                window.prompt(translated("Copy LoRA text"), text);
            }
        }

        return {draw, refreshCards};
    };
})();
