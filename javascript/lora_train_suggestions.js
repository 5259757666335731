/* Settings proposed for the pictures on the page "2 Train", each with its reason and what it would change; put into the fields one
 * by one or all together. All text is set as textContent.
 */
(function() {
    "use strict";

    /** `fill` puts settings into the fields, `settings` gives them as they stand. */
    window.loraTrainSuggestions = function(page, place, fill, settings) {
        const {make, translated} = window.loraTrainStudio.parts;
        const PURPOSES = [["character", "Character"], ["style", "Style"], ["object", "Object"]];
        const button = (text, press, pressed) => make("button", {class: "lora-train-files-button", text: translated(text),
            "data-focus": text, "aria-pressed": pressed === undefined ? null : String(pressed), onclick: press});
        place.className = "lora-train-suggestions";
        place.setAttribute("role", "status");
        place.hidden = true;
        page.button("lora_train_suggest").addEventListener("click", () => ask(""));

        let asked = 0;

        async function ask(purpose) {
            const mine = ++asked;
            place.hidden = false;
            if (!place.querySelector("li")) show(make("div", {class: "lora-train-note", text: translated("Looking at the pictures")}));
            place.setAttribute("aria-busy", "true");
            let found = null, problem = null;
            try {
                found = await page.ask("suggest", {settings: settings(), purpose});
            } catch (error) {
                problem = make("div", {class: "lora-train-problem", role: "alert", text: translated(error.message)});
            }
            // Another purpose was pressed meanwhile.
            if (mine !== asked) return;
            place.removeAttribute("aria-busy");
            if (found) {
                draw(found);
            } else {
                show(problem);
            }
        }

        const same = (one) => one.now === one.value;
        /** As the field shows it: a 0 that stands for "auto" is its placeholder. */
        function shown(name, value) {
            if (typeof value === "boolean") return value ? translated("on") : translated("off");
            const box = page.byId("lora_train_" + name).querySelector("input");
            return String(value || box && box.placeholder || value);
        }

        function draw(found) {
            const changes = found.suggestions.filter((one) => !same(one));
            const apply = (list) => async() => {
                await fill({values: Object.fromEntries(list.map((one) => [one.setting, one.value]))});
                list.forEach((one) => { one.now = one.value; });
                draw(found);
            };
            const row = (one) => make("li", {class: same(one) ? "lora-train-same" : null},
                make("b", {title: one.setting, text: translated(one.label)}),
                make("span", {text: (same(one) ? [one.value] : [one.now, one.value]).map((value) => shown(one.setting, value)).join(" → ")}),
                !same(one) && button("Apply", apply([one])),
                make("div", {class: "lora-train-note", text: translated(one.reason)}));
            show(
                make("div", {class: "lora-train-suggestions-head", role: "group"}, make("b", {text: translated("Settings for")}),
                    ...PURPOSES.map(([purpose, text]) => button(text, () => ask(purpose), purpose === found.purpose)),
                    changes.length > 0 && button("Apply all", apply(changes))),
                make("div", {class: "lora-train-note", text: translated(found.formula)}),
                ...found.warnings.map((text) => make("div", {class: "lora-train-problem", text: translated(text)})),
                make("ul", {}, ...changes.map(row), ...found.suggestions.filter((one) => !changes.includes(one)).map(row)));
        }

        /** The button that was pressed keeps the focus, or the first one has it where that is gone. */
        function show(...parts) {
            const focused = place.contains(document.activeElement) ? document.activeElement.dataset.focus : null;
            place.replaceChildren(make("button", {class: "lora-train-files-close", text: "×", title: translated("Close this list"),
                onclick: () => { place.hidden = true; page.button("lora_train_suggest").focus(); }}), ...parts.filter(Boolean));
            if (focused === null) return;
            const again = [...place.querySelectorAll("button")].find((one) => one.dataset.focus === focused);
            (again || place.querySelector("li button, button")).focus();
        }
    };
})();
