/* A LoRA in a prompt: sent to txt2img with its size, or copied; and the WebUI's LoRA cards made to show new files.
 *
 * loraTrainSend(page): `page` has byId, setText, translated and modelLoaded of lora_train.js. A wish is {lora_text, trigger_word, others, width,
 * height, prompt}: `others` are texts of the same run's files, whose place this one takes; a prompt goes where txt2img has none.
 */
window.loraTrainSend = function(page) {
    "use strict";
    const {byId, setText, translated, modelLoaded} = page;
    let due = false;
    const promptBox = () => byId("txt2img_prompt") && byId("txt2img_prompt").querySelector("textarea");

    /** The trigger word as prompts need it: brackets are plain text in training, and there change the weight. */
    const trigger = ({trigger_word}) => (trigger_word || "").replace(/\\?([()[\]])/g, "\\$1");

    /** Whether a prompt has the word, not only inside of another one or in the name of a LoRA. */
    function says(prompt, word) {
        const exactly = word.replace(/[.*+?^${}()|[\]\\/]/g, "\\$&"), other = "[^\\p{L}\\p{N}_]";
        return new RegExp(`(^|${other})${exactly}($|${other})`, "iu").test(prompt.replace(/<[^>]*>/g, " "));
    }

    /** The text without its weight, "<lora:name:". */
    const begin = (lora) => lora.replace(/[\d.]+>$/, "");

    function prompt(text, wish) {
        const mine = begin(wish.lora_text), escaped = (lora) => begin(lora).replace(/[.*+?^${}()|[\]\\/]/g, "\\$&");
        let written = text.replace(/[\s,]+$/, "") || wish.prompt || "";
        // It takes the place of any file of its run, with the weight that stands there unless another one was chosen.
        for (const other of [...(wish.others || []), wish.lora_text]) {
            written = written.replace(new RegExp(escaped(other) + "(-?[\\d.]+>)", "g"),
                (found, weight) => wish.lora_text.endsWith(":1>") ? mine + weight : wish.lora_text);
        }
        const word = trigger(wish), missing = [says(written, word) ? "" : word, written.includes(mine) ? "" : wish.lora_text];
        return [written, ...missing].filter(Boolean).join(", ");
    }

    /** After a file was written: let the WebUI's LoRA cards show it. Its own refresh fails while it holds no model. */
    function refreshCards() {
        const refresh = byId("txt2img_lora_extra_refresh_internal");
        due = !modelLoaded();
        if (refresh && !due) refresh.dispatchEvent(new Event("click"));
    }

    function send(wish) {
        const box = promptBox();
        if (!box) return;
        setText(box, prompt(box.value, wish));
        for (const side of ["width", "height"]) {
            const number = byId("txt2img_" + side) && byId("txt2img_" + side).querySelector("input[type=number]");
            if (number && wish[side]) setText(number, wish[side]);
        }
        refreshCards();
        if (typeof switch_to_txt2img === "function") switch_to_txt2img();
    }

    function copy(wish) {
        const text = [trigger(wish), wish.lora_text].filter(Boolean).join(", ");
        // Without https there is no clipboard but on localhost; then the text is there to be read and copied.
        if (navigator.clipboard) {
            navigator.clipboard.writeText(text);
        } else {
            window.prompt(translated("Copy LoRA text"), text);
        }
    }

    return {send, copy, refreshCards, refreshDue: () => due && refreshCards(), possible: () => Boolean(promptBox())};
};
