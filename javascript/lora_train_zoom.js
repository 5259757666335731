/* Pictures in full size over the page: arrows go to the one beside, above or below, Escape closes.
 *
 * loraTrainZoom(pictures, translated) returns open(rows, row, column, {beside}). Rows are lists of {path, small, title, about},
 * null where a place is empty; with `beside`, all of a row are shown next to each other.
 */
window.loraTrainZoom = function(pictures, translated) {
    "use strict";
    const {make, button} = window.loraTrainStudio.parts;
    const stage = make("div", {class: "lora-train-zoom-stage"});
    const title = make("b", {translate: "no"}), about = make("span", {translate: "no"});
    const tool = (words, drawn, press) => {
        const made = button(words, press, {kind: "tool", drawn});
        made.className = "lora-train-zoom-tool";
        return made;
    };
    const before = tool("Previous picture", "left", () => move(0, -1)), after = tool("Next picture", "right", () => move(0, 1));
    const close = tool("Close", "close", shut);
    const root = make("div", {
        id: "lora_train_zoom", role: "dialog", "aria-modal": "true", "aria-label": translated("Picture"), tabindex: "-1", hidden: true,
        onkeydown: keys, onclick: (event) => (event.target === root || event.target === stage) && shut(),
    }, make("div", {class: "lora-train-zoom-head"}, make("div", {class: "lora-train-zoom-words", "aria-live": "polite"}, title, about), close),
    make("div", {class: "lora-train-zoom-body"}, before, stage, after));
    window.loraTrainLanguage.watch(root);
    let rows = [], at = [0, 0], beside = false, origin = null;

    function open(given, row, column, {beside: all = false} = {}) {
        rows = given;
        at = [row, column];
        beside = all;
        origin = document.activeElement;
        if (!root.isConnected) document.body.append(root);
        root.hidden = false;
        draw();
        close.focus();
    }

    function shut() {
        root.hidden = true;
        stage.replaceChildren();
        if (origin && origin.isConnected) origin.focus();
    }

    /** The next place in that direction that is not empty; null at the edge. */
    function neighbour(down, right) {
        let [row, column] = at;
        do {
            row += down;
            column += right;
            if (!rows[row] || column < 0 || column >= rows[row].length) return null;
        } while (!rows[row][column]);
        return [row, column];
    }

    function move(down, right) {
        const next = neighbour(down, beside ? 0 : right);
        if (!next) return;
        at = next;
        draw();
    }

    function keys(event) {
        const way = {ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0]}[event.key];
        if (way) {
            move(...way);
        } else if (event.key === "Escape") {
            shut();
        } else if (event.key === "Tab") {
            const stops = [before, after, close].filter((one) => !one.disabled && !one.hidden);
            const next = stops.indexOf(document.activeElement) + (event.shiftKey ? -1 : 1);
            stops[(next + stops.length) % stops.length].focus();
        } else if (event.key !== "Enter" && event.key !== " ") {
            return;
        }
        // The WebUI has shortcuts of its own for these.
        event.stopPropagation();
        if (event.key !== "Enter" && event.key !== " ") event.preventDefault();
    }

    function pane(entry) {
        const image = make("img", {alt: [entry.title, entry.about].filter(Boolean).join(", "), translate: "no"});
        if (entry.small) pictures.show(image, entry.small);
        pictures.show(image, entry.path);
        return image;
    }

    function draw() {
        const [row, column] = at, entry = rows[row][column];
        title.textContent = beside ? "" : entry.title;
        about.textContent = entry.about || "";
        for (const [press, right] of [[before, -1], [after, 1]]) {
            press.hidden = beside;
            press.disabled = !neighbour(0, right);
        }
        stage.replaceChildren(...(beside ? rows[row].filter(Boolean) : [entry]).map((one) => beside ?
            make("figure", {}, pane(one), make("figcaption", {text: one.title})) : pane(one)));
        // What is next is there when it is asked for.
        if (beside) return;
        for (const next of [neighbour(0, 1), neighbour(0, -1)]) {
            if (next) pictures.show(make("img", {}), rows[next[0]][next[1]].path, () => null);
        }
    }

    return open;
};
