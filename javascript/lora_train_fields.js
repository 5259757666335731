/* The fields of the page "2 Train": the summary follows them, and the browser remembers them. Its plan is asked for by a hidden
 * button of gradio's, which drops a press while the answer to the one before is awaited, and answers may overtake one another:
 * so each question has a number, which its answer carries, and the button is pressed until the newest is answered.
 *
 * loraTrainFields(byId, button) returns what lora_train.js shares with the others.
 */
window.loraTrainFields = function(byId, button) {
    "use strict";
    const PLAN_MS = 400, AFTER_PRESS_MS = 2000, LONGEST_MS = 100000, RESTORE_MS = 500;
    const DRAFT_KEY = "lora_train_draft";
    let asked = 0, timer = 0;

    const box = (name) => byId("lora_train_" + name).querySelector("textarea, input");
    const isPlanned = () => box("planned").value === (asked ? String(asked) : "");

    function planSoon(event) {
        if (event && event.target.closest(".lora-train-hidden")) return;
        asked += 1;
        setText(box("number"), String(asked));
        planIn(PLAN_MS);
    }

    /** Press after so long, and again where that was not answered; a server that is gone is not asked for ever. */
    function planIn(milliseconds) {
        clearTimeout(timer);
        timer = setTimeout(() => {
            timer = 0;
            if (isPlanned() || milliseconds > LONGEST_MS) return;
            button("lora_train_plan").click();
            planIn(2 * milliseconds);
        }, milliseconds);
    }

    /** The server answers: see to it that the newest plan is what is shown. */
    function checkPlan() {
        if (!timer && !isPlanned()) planIn(PLAN_MS);
    }

    /** The press of a button that starts something renews the summary by itself. */
    function planAfterPress() {
        if (timer) planIn(AFTER_PRESS_MS);
    }

    /** All settings as they stood in the fields when the page planned last. */
    function settings() {
        const {preset_version: _, ...values} = JSON.parse(box("draft").value);
        return values;
    }

    /** The settings of these names; {} before the page has planned. */
    function chosen(names) {
        try {
            const draft = JSON.parse(box("draft").value);
            return Object.fromEntries(names.filter((name) => name in draft).map((name) => [name, draft[name]]));
        } catch (error) {
            return {};
        }
    }

    function keepDraft() {
        try {
            if (box("draft").value) localStorage.setItem(DRAFT_KEY, box("draft").value);
        } catch (error) { /* a browser that keeps nothing */ }
    }

    /** Fill the fields with what the browser remembers; what is written into one before the promise is kept may be lost. */
    function restoreDraft() {
        let draft = "";
        try {
            draft = localStorage.getItem(DRAFT_KEY) || "";
        } catch (error) { /* a browser that keeps nothing */ }
        // gradio draws its buttons some time before it listens to them.
        return new Promise((resolve) => {
            const press = (patience) => {
                if (patience === 0 || box("restored").value) return resolve();
                if (draft) setText(box("draft"), draft);
                button("lora_train_restore").click();
                setTimeout(() => press(patience - 1), RESTORE_MS);
            };
            press(20);
        });
    }

    function setText(target, text) {
        target.value = text;
        if (typeof updateInput === "function") {
            updateInput(target);
        } else {
            target.dispatchEvent(new Event("input", {bubbles: true}));
        }
    }

    return {planSoon, checkPlan, planAfterPress, settings, chosen, keepDraft, restoreDraft, setText};
};
