/* Files of settings on the page "2 Train": another program's, ours, or a LoRA ("train like this one") fill the fields when they
 * are opened or dropped, and a list tells what became of each name; the settings go out as TOML; presets of one's own are
 * saved, renamed, deleted and given away. Of a LoRA only its header is sent. All text is set as textContent.
 */
(function() {
    "use strict";
    const TAKEN = ".toml,.json,.safetensors", MOST_BYTES = 32 << 20;
    const KINDS = [["refused", "Not taken"], ["changed", "Read as something else here"], ["taken", "Taken as they are"],
        ["unused", "Not needed here, or off"]];

    /** `settings` gives the fields' values by name, as the page remembers them. Returns fill({values}), which puts such values into
     * the fields. */
    window.loraTrainFiles = function(page, place, settings) {
        const {make, offer, dropping, translated} = window.loraTrainStudio.parts;
        const list = make("div", {class: "lora-train-files-list", role: "status", hidden: true});
        const bar = make("div", {class: "lora-train-files-bar"});
        const input = make("input", {type: "file", accept: TAKEN, hidden: true, onchange: () => {
            open(input.files[0]);
            input.value = "";
        }});
        place.append(bar, input, list);
        for (const [text, hint, press] of [
            ["Open settings", "A file of settings of kohya's scripts, kohya_ss, lora-scripts, LoRA Easy or OneTrainer, one of ours, " +
                "or a LoRA, to train like it. It can also be dropped on this page.", () => input.click()],
            ["Download", "These settings as a TOML file.", download],
            ["Save preset", "Keep these settings under a name, without those that belong to one LoRA.", save],
            ["Rename", "Give your preset another name.", rename], ["Delete", "Delete your preset.", remove],
            ["Share", "The preset as a file to give away: whoever opens it gets its settings.", share]]) {
            bar.append(make("button", {
                class: "lora-train-files-button", text: translated(text), title: translated(hint), onclick: () => guarded(press)}));
        }
        dropping(page.byId("lora_train_page_train") || place, "lora-train-dropping", (transfer) => open(transfer.files[0]));

        /** The name of the preset in the list, without ", changed". */
        function preset() {
            const shown = page.byId("lora_train_preset").querySelector("input");
            return (shown ? shown.value : "").replace(/, changed$/, "");
        }

        async function guarded(press) {
            try {
                await press();
            } catch (error) {
                say(error.message, true);
            }
        }

        function open(file) {
            return guarded(async() => {
                if (!file) return;
                const found = await page.api.send("settings/read?name=" + encodeURIComponent(file.name), await bytesOf(file));
                await fill({values: found.values, foreign: found.foreign});
                tell(file.name, found);
            });
        }

        async function bytesOf(file) {
            let bytes = file;
            if (/\.safetensors$/i.test(file.name) && file.size > 8) {
                const length = new DataView(await file.slice(0, 8).arrayBuffer()).getBigUint64(0, true);
                bytes = file.slice(0, 8 + Number(length > MOST_BYTES ? MOST_BYTES : length));
            }
            if (bytes.size > MOST_BYTES) throw new Error(translated`${file.name}: this is no file of settings.`);
            return bytes;
        }

        /** Into gradio's fields, by a hidden button. */
        async function fill(told) {
            await page.restored;
            page.setText(page.byId("lora_train_incoming").querySelector("textarea, input"), JSON.stringify(told));
            page.button("lora_train_fill").click();
        }

        function say(text, problem) {
            show(make("div", {class: problem ? "lora-train-problem" : "lora-train-note", text: translated(text)}));
        }

        function show(...elements) {
            list.replaceChildren(make("button", {
                class: "lora-train-files-close", text: "×", title: translated("Close this list"),
                onclick: () => { list.hidden = true; }}), ...elements);
            list.hidden = false;
        }

        function tell(name, found) {
            const head = make("div", {class: "lora-train-files-head"}, make("span", {translate: "no", text: name}), " · ", translated(found.program));
            const groups = found.foreign ? KINDS.map(([kind, title]) => group(kind, translated(title), found.entries)) : [];
            const implied = Object.entries(found.implied).map(([key, value]) => key + " = " + value).join(", ");
            const notes = [...found.notes];
            if (implied) notes.push(translated`Left out in the file, and taken as its program has it: ${implied}`);
            if (!found.foreign && !notes.length) notes.push(translated`${found.entries.length} settings were taken`);
            show(head, ...groups.filter(Boolean), ...notes.map((text) => make("div", {class: "lora-train-note", text: translated(text)})));
        }

        /** What fared alike, folded but for what was not taken and what is another now. */
        function group(kind, title, entries) {
            const same = entries.filter((entry) => entry.kind === kind);
            if (!same.length) return null;
            return make("details", {class: "lora-train-files-" + kind, open: kind === "refused" || kind === "changed"},
                make("summary", {text: title + ": " + same.length}), make("ul", {}, ...same.map(({name, value, text}) =>
                    make("li", {}, make("code", {translate: "no", text: name + (value === "" ? "" : " = " + value)}),
                        text && " · " + translated(text)))));
        }

        async function download() {
            offer(await page.api.blob("settings/file", {settings: settings()}), "settings.toml");
        }

        async function share() {
            offer(await page.api.blob("presets/file?name=" + encodeURIComponent(preset())), preset() + ".toml");
        }

        async function save() {
            const {presets} = await page.api.ask("presets");
            const own = (name) => presets.some((other) => other.own && other.name.toLowerCase() === name.toLowerCase());
            const name = (window.prompt(translated("Name of the preset"), own(preset()) ? preset() : "") || "").trim();
            if (!name || (own(name) && !window.confirm(translated`Replace the preset ${name}?`))) return;
            const saved = await page.api.ask("presets/save", {name, settings: settings()});
            await fill({preset: saved.name});
            say(translated`Saved as ${saved.name}, version ${saved.version}.`);
        }

        async function rename() {
            const to = (window.prompt(translated`New name of ${preset()}`, preset()) || "").trim();
            if (!to || to === preset()) return;
            await fill({preset: (await page.api.ask("presets/rename", {name: preset(), to})).name});
        }

        async function remove() {
            const name = preset();
            if (!window.confirm(translated`Delete the preset ${name}?`)) return;
            await page.api.ask("presets/delete", {name});
            await fill({preset: ""});
        }

        return fill;
    };
})();
