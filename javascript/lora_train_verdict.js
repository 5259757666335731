/* How a training goes, in a sentence, with a link that puts the setting it names into its field on the page "2 Train".
 *
 * loraTrainVerdict(page) returns {element, draw(diagnosed)}; `page` is that of lora_train.js.
 */
window.loraTrainVerdict = function(page) {
    "use strict";
    const {byId, setText, planSoon, translated, turnTo} = page;
    const {make, icon} = window.loraTrainStudio.parts, TRAIN = 1;
    const KINDS = {learning: "good", plateau: "fair", "too slow": "fair", overfitting: "fair", words: "fair", rate: "good"};
    const text = make("span", {}), apply = make("button", {type: "button", class: "lora-train-apply"});
    const mark = make("span", {class: "lora-train-verdict-mark"});
    const element = make("div", {class: "lora-train-verdict", role: "status", hidden: true}, mark, make("div", {}, text, " ", apply));

    /** What the setting is typed into; null for one that is chosen from a list or is not on the page. */
    function control(name) {
        const field = name && byId("lora_train_" + name);
        if (!field || field.querySelector("ul.options, [role=listbox], .wrap-inner")) return null;
        return field.querySelector("input[type=checkbox], input[type=number], input[type=text], textarea, input");
    }

    async function write(name, value) {
        turnTo(TRAIN);
        await page.restored;
        const box = control(name);
        if (!box) return;
        const fold = box.closest(".lora-train-fold"), title = fold && fold.querySelector(".label-wrap:not(.open)");
        if (title) title.click();
        if (box.type === "checkbox") {
            if (box.checked !== ["true", "1"].includes(value.toLowerCase())) box.click();
        } else {
            setText(box, value);
        }
        planSoon();
        // A fold that was closed takes a moment.
        setTimeout(() => {
            box.focus({preventScroll: true});
            box.scrollIntoView({block: "center"});
        }, 100);
    }

    function draw(diagnosed) {
        element.hidden = !diagnosed;
        if (!diagnosed) return;
        const kind = KINDS[diagnosed.finding] || "bad";
        element.dataset.kind = kind;
        element.dataset.finding = diagnosed.finding;
        if (!mark.firstChild || mark.dataset.kind !== kind) mark.replaceChildren(icon(kind === "good" ? "check" : "warning"));
        mark.dataset.kind = kind;
        // Read out when its text changes.
        const told = translated(diagnosed.message);
        if (text.textContent !== told) text.textContent = told;
        apply.hidden = !control(diagnosed.setting);
        apply.textContent = translated("Apply");
        apply.title = diagnosed.setting + " = " + diagnosed.value;
        apply.onclick = () => write(diagnosed.setting, diagnosed.value);
    }

    return {element, draw};
};
