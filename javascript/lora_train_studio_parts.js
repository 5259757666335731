/* Parts that the dataset studio is built of: elements, buttons, fields, drawings. No part knows what it is used for.
 *
 * What a user, a file or the server says goes into textContent only. Colours and sizes are in style.css.
 */
(function(studio) {
    "use strict";
    const SVG = "http://www.w3.org/2000/svg";

    // Lines on a field of 24 by 24.
    const ICONS = {
        add: "M12 5v14M5 12h14", check: "M5 12.5l4.5 4.5L19 7.5", crop: "M7 2v15h15M2 7h15v15",
        caption: "M4 6h16M4 11h16M4 16h9", train: "M6 4l14 8-14 8z", undo: "M9 14L4 9l5-5M4 9h9a7 7 0 0 1 0 14h-2",
        redo: "M15 14l5-5-5-5M20 9h-9a7 7 0 0 0 0 14h2", save: "M5 3h11l3 3v15H5zM8 3v6h7V3M8 21v-7h8v7",
        remove: "M4 7h16M9 7V4h6v3M6 7l1 14h10l1-14M10 11v6M14 11v6", flip: "M12 3v18M9 7L3 17h6zM15 7l6 10h-6z",
        split: "M3 3h18v18H3zM12 3v18M3 12h18", warning: "M12 4l9 16H3zM12 10v5M12 17.5v.5",
        folder: "M3 6h6l2 3h10v11H3z", upload: "M12 16V4M7 9l5-5 5 5M4 20h16", close: "M6 6l12 12M18 6L6 18",
        left: "M15 5l-7 7 7 7", right: "M9 5l7 7-7 7", picture: "M3 5h18v14H3zM3 16l5-5 4 4 4-5 5 6M8 9v.1",
        mask: "M3 7c6-3 12-3 18 0 0 8-3 11-6 11-2 0-2-2-3-2s-1 2-3 2c-3 0-6-3-6-11M7 10h3M14 10h3",
        copy: "M8 8h12v12H8zM16 8V4H4v12h4",
        back: "M4 12a8 8 0 1 1 2.5 5.8M4 18v-5h5",
        scale: "M12 4v16M8 20h8M4 7h16M4 7l-2.5 7h5zM20 7l-2.5 7h5z",
        search: "M11 5a6 6 0 1 1 0 12 6 6 0 0 1 0-12M15.5 15.5L20 20",
    };

    const translated = (...given) => window.loraTrainLanguage.translated(...given);

    /** An element; properties that start with "on" are listeners, others attributes, but for class and text. */
    function make(tag, properties, ...children) {
        const made = document.createElement(tag);
        for (const [name, value] of Object.entries(properties || {})) {
            if (value === null || value === undefined || value === false) continue;
            if (name === "class") {
                made.className = value;
            } else if (name === "text") {
                made.textContent = value;
            } else if (name === "value" || name === "disabled" || name === "checked") {
                made[name] = value;
            } else if (name.startsWith("on")) {
                made.addEventListener(name.slice(2), value);
            } else {
                made.setAttribute(name, value === true ? "" : value);
            }
        }
        made.append(...children.filter((child) => child !== null && child !== undefined && child !== false));
        return made;
    }

    function icon(name) {
        const drawing = document.createElementNS(SVG, "svg"), path = document.createElementNS(SVG, "path");
        drawing.setAttribute("viewBox", "0 0 24 24");
        drawing.setAttribute("class", "lts-icon");
        drawing.setAttribute("aria-hidden", "true");
        path.setAttribute("d", ICONS[name]);
        drawing.append(path);
        return drawing;
    }

    /** kind: "primary", "plain", "stop" or "tool" (a drawing without words; then `text` is its tooltip). */
    function button(text, press, {kind = "plain", drawn = "", title = "", id = "", disabled = false} = {}) {
        const shown = translated(text), tool = kind === "tool";
        return make(
            "button", {
                class: "lts-button lts-" + kind, type: "button", id: id || null, disabled: disabled, onclick: press,
                title: translated(title) || (tool ? shown : null), "aria-label": tool ? shown : null,
            },
            drawn ? icon(drawn) : null, tool ? null : make("span", {text: shown}));
    }

    /** A control under its name. */
    function field(label, control, help) {
        return make("label", {class: "lts-field", title: help ? translated(help) : null},
            make("span", {class: "lts-label", text: translated(label)}), control);
    }

    function tick(label, checked, change, help) {
        const box = make("input", {type: "checkbox", checked: checked, onchange: () => change(box.checked)});
        return make("label", {class: "lts-tick", title: help ? translated(help) : null}, box,
            make("span", {text: translated(label)}));
    }

    function textBox(value, change, {placeholder = "", id = "", label = ""} = {}) {
        const box = make("input", {
            type: "text", class: "lts-input", value: value, id: id || null, placeholder: translated(placeholder),
            "aria-label": label ? translated(label) : null, spellcheck: "false", autocomplete: "off",
            oninput: () => change(box.value),
        });
        return box;
    }

    function numberBox(value, change, {minimum = null, maximum = null, step = null, id = ""} = {}) {
        const box = make("input", {
            type: "number", class: "lts-input", value: value, min: minimum, max: maximum, step: step, id: id || null,
            onchange: () => change(box.value === "" ? null : Number(box.value)),
        });
        return box;
    }

    /** choices: [value, words], as they are shown; with `own` there are names of the user's among them. */
    function choice(choices, value, change, {id = "", label = "", own = false} = {}) {
        const list = make("select", {
            class: "lts-input", id: id || null, "aria-label": label ? translated(label) : null, translate: own ? "no" : null,
            onchange: () => change(choices[list.selectedIndex][0]),
        }, ...choices.map(([, words]) => make("option", {text: words})));
        list.selectedIndex = Math.max(0, choices.findIndex(([known]) => known === value));
        return list;
    }

    /** A few choices beside each other, one of them pressed. choices: [value, words, tooltip]. */
    function pills(choices, value, change, label) {
        const row = make("div", {class: "lts-pills", role: "group", "aria-label": translated(label || "")});
        const draw = (chosen) => row.replaceChildren(...choices.map(([known, words, help]) => make("button", {
            type: "button", class: "lts-pill", "aria-pressed": String(known === chosen), text: translated(words),
            title: help ? translated(help) : null,
            onclick: () => {
                draw(known);
                change(known);
            },
        })));
        draw(value);
        return row;
    }

    /** "1 picture", "2 pictures". */
    function count(number, one) {
        return translated(number === 1 ? "1 " + one : number.toLocaleString("en") + " " + one + "s");
    }

    /** Runs `what` once, that long after the last call. */
    function later(what, milliseconds) {
        let timer = 0;
        return (...given) => {
            clearTimeout(timer);
            timer = setTimeout(() => what(...given), milliseconds);
        };
    }

    /** What a press does; a second press is passed over while the first is being obeyed, as that of a double click. */
    function once(what) {
        let busy = false;
        return async(...given) => {
            if (busy) return null;
            busy = true;
            try {
                return await what(...given);
            } finally {
                busy = false;
            }
        };
    }

    /** Have the browser keep `blob` as a file of that name. */
    function offer(blob, name) {
        const link = make("a", {href: URL.createObjectURL(blob), download: name});
        link.click();
        setTimeout(() => URL.revokeObjectURL(link.href), 10000);
    }

    /** Have files that are dropped anywhere in `root` `taken`, which gets what was transferred; while they are over it, it has
     * the class `over`. The WebUI itself takes only those dropped on its own fields. */
    function dropping(root, over, taken) {
        let depth = 0;
        const mark = (change) => {
            depth = Math.max(0, change);
            root.classList.toggle(over, depth > 0);
        };
        const files = (event) => event.dataTransfer && [...event.dataTransfer.types].includes("Files");
        root.addEventListener("dragenter", (event) => files(event) && mark(depth + 1));
        root.addEventListener("dragleave", (event) => files(event) && mark(depth - 1));
        root.addEventListener("dragover", (event) => {
            if (!files(event)) return;
            event.preventDefault();
            event.stopPropagation();
            event.dataTransfer.dropEffect = "copy";
        });
        root.addEventListener("drop", (event) => {
            if (!files(event)) return;
            event.preventDefault();
            event.stopPropagation();
            mark(0);
            taken(event.dataTransfer);
        });
    }

    /** What is said wherever a mask is shown or painted. */
    studio.MASKS_USED =
        "Masks count where Masked loss (masked_loss) is on: what is white in them is learnt.";

    /** What is said of a picture that is held out. */
    studio.HELD_OUT = "Not trained on: the LoRA is measured on it, which shows whether it learns or copies.";

    studio.parts = {
        make, icon, button, field, tick, textBox, numberBox, choice, pills, count, later, once, offer, dropping, translated};
})(window.loraTrainStudio = window.loraTrainStudio || {});
