/* The pictures that a run painted on the way: a line for each prompt, a column for each step, the base model first and the
 * newest in sight. A press shows one in full size.
 *
 * loraTrainStrip(place, page), with pictures, zoom and translated of the page, returns draw(run, samples).
 */
window.loraTrainStrip = function(place, page) {
    "use strict";
    const {pictures, zoom, translated} = page;
    const {make} = window.loraTrainStudio.parts, AT_THE_END = 60;
    const scroller = make("div", {class: "lora-train-strip", role: "group", "aria-label": translated("Pictures while it trains")});
    const tiles = new Map();
    let known = "", shown = "";
    place.append(scroller);

    const address = (run, file, small) => `results/file?run=${encodeURIComponent(run)}&name=${encodeURIComponent(file)}` + (small ? "&small=1" : "");
    const words = (picture) => (picture.step === 0 ? translated("Base model") :
        translated`step ${picture.step} · epoch ${picture.epoch}`);

    function rows(run, samples, steps) {
        return samples.map(({prompt, pictures: list}) => steps.map((step) => {
            // Sampled twice at a step, the newer one counts.
            const found = list.filter((one) => one.step === step).pop();
            return found ? {
                path: address(run, found.file, false), small: address(run, found.file, true), title: words(found), about: prompt,
                file: found.file, step,
            } : null;
        }));
    }

    function tile(entry) {
        const made = tiles.get(entry.file) || make("button", {type: "button", class: "lora-train-tile", translate: "no"},
            make("img", {alt: "", loading: "lazy"}),
            make("span", {text: entry.step === 0 ? translated("base") : String(entry.step)}));
        if (!tiles.has(entry.file)) {
            tiles.set(entry.file, made);
            made.title = entry.title;
            made.setAttribute("aria-label", entry.title + ", " + entry.about);
            pictures.showInSight(made.firstChild, entry.small);
        }
        return made;
    }

    return function(run, samples) {
        const now = JSON.stringify([run, samples]);
        if (now === known) return;
        known = now;
        const list = (samples || []).filter((row) => row.pictures.length);
        place.hidden = !list.length;
        if (run !== shown) tiles.clear();
        const first = run !== shown, atTheEnd = scroller.scrollLeft + scroller.clientWidth > scroller.scrollWidth - AT_THE_END;
        shown = run;
        const steps = [...new Set(list.flatMap((row) => row.pictures.map((one) => one.step)))].sort((a, b) => a - b);
        const entries = rows(run, list, steps), focused = document.activeElement;
        scroller.replaceChildren(...entries.map((row, index) => make("div", {class: "lora-train-strip-row"},
            make("div", {class: "lora-train-prompt", translate: "no", text: list[index].prompt, title: list[index].prompt}),
            make("div", {class: "lora-train-tiles"}, ...row.map((entry, column) => {
                if (!entry) return make("span", {class: "lora-train-tile"});
                const made = tile(entry);
                made.onclick = () => zoom(entries, index, column);
                return made;
            })))));
        if (focused && focused.isConnected && focused !== document.activeElement) focused.focus();
        if (first || atTheEnd) scroller.scrollLeft = scroller.scrollWidth;
    };
};
