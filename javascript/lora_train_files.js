/* Files of settings on the page "2 Train": another program's, ours, or a LoRA ("train like this one") fill the fields when they
 * are opened or dropped, and a list tells what became of each name; the settings go out as TOML; presets of one's own are
 * saved, renamed, deleted and given away. Of a LoRA only its header is sent. All text is set as textContent.
 */
(function() {
    "use strict";
    const TAKEN = ".toml,.json,.safetensors", MOST_BYTES = 32 << 20;
    const KINDS = [["refused", "Not taken"], ["changed", "Read as something else here"], ["taken", "Taken as they are"],
        ["unused", "Not needed here, or off"]];

    /** `settings` gives the fields' values by name, as the page remembers them. */
    window.loraTrainFiles = function(page, place, settings) {
        const {translated} = page;
        const list = document.createElement("div"), bar = document.createElement("div"), input = document.createElement("input");
        bar.className = "lora-train-files-bar";
        list.className = "lora-train-files-list";
        list.setAttribute("role", "status");
        list.hidden = true;
        Object.assign(input, {type: "file", accept: TAKEN, hidden: true});
        input.addEventListener("change", () => {
            open(input.files[0]);
            input.value = "";
        });
        place.append(bar, input, list);
        for (const [text, hint, press] of [
            ["Open settings", "A file of settings of kohya's scripts, kohya_ss, lora-scripts, LoRA Easy or OneTrainer, one of ours, " +
                "or a LoRA, to train like it. It can also be dropped on this page.", () => input.click()],
            ["Download", "These settings as a TOML file.", download],
            ["Save preset", "Keep these settings under a name, without those that belong to one LoRA.", save],
            ["Rename", "Give your preset another name.", rename], ["Delete", "Delete your preset.", remove],
            ["Share", "The preset as a file to give away: whoever opens it gets its settings.", share]]) {
            const button = document.createElement("button");
            button.className = "lora-train-files-button";
            button.textContent = translated(text);
            button.title = translated(hint);
            button.addEventListener("click", () => guarded(press));
            bar.append(button);
        }
        dropping(page.byId("lora_train_page_train") || place, (file) => open(file));

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
                fill({values: found.values, foreign: found.foreign});
                tell(file.name, found);
            });
        }

        async function bytesOf(file) {
            let bytes = file;
            if (/\.safetensors$/i.test(file.name) && file.size > 8) {
                const length = new DataView(await file.slice(0, 8).arrayBuffer()).getBigUint64(0, true);
                bytes = file.slice(0, 8 + Number(length > MOST_BYTES ? MOST_BYTES : length));
            }
            if (bytes.size > MOST_BYTES) throw new Error(file.name + ": " + translated("this is no file of settings."));
            return bytes;
        }

        /** Into gradio's fields, by a hidden button. */
        function fill(told) {
            page.setText(page.byId("lora_train_incoming").querySelector("textarea, input"), JSON.stringify(told));
            page.button("lora_train_fill").click();
        }

        function say(text, problem) {
            const line = document.createElement("div");
            line.className = problem ? "lora-train-problem" : "lora-train-note";
            line.textContent = text;
            show(line);
        }

        function show(...elements) {
            const close = document.createElement("button");
            close.className = "lora-train-files-close";
            close.textContent = "×";
            close.title = translated("Close this list");
            close.addEventListener("click", () => { list.hidden = true; });
            list.replaceChildren(close, ...elements);
            list.hidden = false;
        }

        function tell(name, found) {
            const head = document.createElement("div");
            head.className = "lora-train-files-head";
            head.textContent = name + " · " + found.program;
            const groups = found.foreign ? KINDS.map(([kind, title]) => group(kind, translated(title), found.entries)) : [];
            const implied = Object.entries(found.implied).map(([key, value]) => key + " = " + value).join(", ");
            const notes = [...found.notes];
            if (implied) notes.push(translated("Left out in the file, and taken as its program has it:") + " " + implied);
            if (!found.foreign && !notes.length) notes.push(found.entries.length + " " + translated("settings were taken"));
            show(head, ...groups.filter(Boolean), ...notes.map((text) => {
                const line = document.createElement("div");
                line.className = "lora-train-note";
                line.textContent = text;
                return line;
            }));
        }

        /** What fared alike, folded but for what was not taken and what is another now. */
        function group(kind, title, entries) {
            const same = entries.filter((entry) => entry.kind === kind);
            if (!same.length) return null;
            const fold = document.createElement("details"), summary = document.createElement("summary");
            const items = document.createElement("ul");
            fold.className = "lora-train-files-" + kind;
            fold.open = kind === "refused" || kind === "changed";
            summary.textContent = title + ": " + same.length;
            for (const {name, value, text} of same) {
                const item = document.createElement("li"), term = document.createElement("code");
                term.textContent = name + (value === "" ? "" : " = " + value);
                item.append(term, text ? " · " + text : "");
                items.append(item);
            }
            fold.append(summary, items);
            return fold;
        }

        async function download() {
            offer(await page.api.blob("settings/file", {settings: settings()}), "settings");
        }

        async function share() {
            offer(await page.api.blob("presets/file?name=" + encodeURIComponent(preset())), preset());
        }

        async function save() {
            const {presets} = await page.api.ask("presets");
            const own = (name) => presets.some((other) => other.own && other.name.toLowerCase() === name.toLowerCase());
            const name = (window.prompt(translated("Name of the preset"), own(preset()) ? preset() : "") || "").trim();
            if (!name || (own(name) && !window.confirm(translated("Replace the preset") + " " + name + "?"))) return;
            const saved = await page.api.ask("presets/save", {name, settings: settings()});
            fill({preset: saved.name});
            say(translated("Saved as") + " " + saved.name + ", " + translated("version") + " " + saved.version + ".");
        }

        async function rename() {
            const to = (window.prompt(translated("New name of") + " " + preset(), preset()) || "").trim();
            if (!to || to === preset()) return;
            fill({preset: (await page.api.ask("presets/rename", {name: preset(), to})).name});
        }

        async function remove() {
            const name = preset();
            if (!window.confirm(translated("Delete the preset") + " " + name + "?")) return;
            await page.api.ask("presets/delete", {name});
            fill({preset: ""});
        }
    };

    /** Have the browser keep `blob` as a TOML file of that name. */
    function offer(blob, name) {
        const link = document.createElement("a");
        link.href = URL.createObjectURL(blob);
        link.download = name + ".toml";
        link.click();
        setTimeout(() => URL.revokeObjectURL(link.href), 10000);
    }
    window.loraTrainOffer = offer;

    /** Have a file that is dropped anywhere in `root` taken. */
    function dropping(root, taken) {
        const files = (event) => event.dataTransfer && [...event.dataTransfer.types].includes("Files");
        root.addEventListener("dragover", (event) => {
            if (!files(event)) return;
            event.preventDefault();
            event.dataTransfer.dropEffect = "copy";
            root.classList.add("lora-train-dropping");
        });
        for (const name of ["dragleave", "drop"]) {
            root.addEventListener(name, () => root.classList.remove("lora-train-dropping"));
        }
        root.addEventListener("drop", (event) => {
            if (!files(event)) return;
            event.preventDefault();
            event.stopPropagation();
            taken(event.dataTransfer.files[0]);
        });
    }
})();
