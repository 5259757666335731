/* A sweep beside the queue on the page "2 Train": some settings with several values each, of which each combination becomes a run
 * of the queue. How many runs and steps that are is told before.
 *
 * loraTrainSweep(page, enqueue) returns its element; enqueue({axes}) queues the fields' settings with these values.
 */
window.loraTrainSweep = function(page, enqueue) {
    "use strict";
    const {make, translated, later, once, count} = window.loraTrainStudio.parts, ASK_MS = 500, NAMES = "lora_train_sweep_names";
    const rows = make("div", {class: "lora-train-sweep-rows"}), told = make("div", {class: "lora-train-note", role: "status"});
    const names = make("datalist", {id: NAMES});
    const small = (text, title, press, id) => make("button", {
        class: "lora-train-files-button", type: "button", id, text: translated(text), title: translated(title), onclick: press});
    const add = small("Queue the sweep", "Put a run for each combination of the values into the queue: all of them or none.",
        once(queueIt), "lora_train_sweep_add");
    let asked = 0;

    function row(name = "", values = "") {
        const made = make("div", {class: "lora-train-sweep-row"},
            make("input", {type: "text", class: "lts-input", list: NAMES, value: name, spellcheck: "false", autocomplete: "off",
                placeholder: translated("Setting"), "aria-label": translated("Setting"), oninput: plan}),
            make("input", {type: "text", class: "lts-input", value: values, spellcheck: "false", autocomplete: "off",
                placeholder: translated("Values"), "aria-label": translated("Values, with spaces or commas between them"), oninput: plan}),
            small("×", "Take this setting out of the sweep.", () => {
                made.remove();
                tell();
            }));
        rows.append(made);
    }

    /** {setting: [values]} of the rows that are filled in. */
    function axes() {
        const found = {};
        for (const made of rows.children) {
            const [name, values] = [...made.querySelectorAll("input")].map((box) => box.value.trim());
            const list = values.split(/[\s,]+/).filter(Boolean);
            if (name && list.length) found[name] = [...(found[name] || []), ...list];
        }
        return found;
    }

    /** The button is disabled until the answer is here: a double click asks once. */
    async function queueIt() {
        const mine = asked;
        add.disabled = true;
        await enqueue({axes: axes()});
        if (mine !== asked) return;
        add.disabled = false;
        if (document.activeElement === document.body) add.focus();
    }

    async function tell() {
        const mine = ++asked, chosen = axes();
        add.disabled = true;
        told.classList.remove("lora-train-problem");
        told.textContent = "";
        if (!Object.keys(chosen).length) return;
        try {
            const found = await page.ask("queue/sweep/plan", {settings: page.settings(), axes: chosen});
            if (mine !== asked) return;
            told.textContent = [count(found.runs, "run"), count(found.steps, "step"), translated(found.estimate)].filter(Boolean).join(" · ");
            told.title = found.names.join("\n");
            add.disabled = false;
        } catch (error) {
            if (mine !== asked) return;
            told.textContent = translated(error.message);
            told.classList.add("lora-train-problem");
        }
    }

    const plan = later(tell, ASK_MS), planOpen = () => fold.open && plan();

    row("learning_rate");
    row("seed");
    add.disabled = true;
    const fold = make("details", {class: "lora-train-sweep", id: "lora_train_sweep", ontoggle: () => {
        if (!fold.open) return;
        if (!names.children.length) {
            names.append(...Object.keys(page.settings()).map((name) => make("option", {value: name})));
            page.byId("lora_train").addEventListener("change", planOpen);
            // The summary is written once the page knows its fields anew, also after a preset or a file filled them.
            new MutationObserver(planOpen).observe(page.byId("lora_train_summary"), {childList: true, characterData: true, subtree: true});
        }
        tell();
    }}, make("summary", {text: translated("Sweep"), title: translated(
        "Train with several values of some settings, and compare what comes of it. Several seeds show what is chance.")}),
    names, rows, make("div", {class: "lora-train-queue-bar"},
        small("Another setting", "A line for another setting.", () => row()), add, told));
    return fold;
};
