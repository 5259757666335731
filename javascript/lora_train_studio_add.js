/* Bringing pictures in: the first page of all, the step "Add pictures", and files dropped anywhere on the page. */
(function(studio) {
    "use strict";
    const TAKEN = "image/*,.png,.jpg,.jpeg,.webp,.bmp,.gif,.tif,.tiff,.zip,.txt,.caption,.json,.jsonl", UPLOADS = 3, MOST_SAID = 5;
    // Sets of pictures that come with the extension: what the server calls each, and the dataset that is made of it.
    const SAMPLES = [{
        set: "style", name: "sticker style", trigger: "sticker", words: "24 stickers in one style",
        help: "Noto Emoji (Apache 2.0) made into stickers, with captions",
    }, {
        set: "subject", name: "zorbi", trigger: "zorbi", words: "12 drawings of a character",
        help: "A drawn creature in twelve scenes, with captions",
    }];
    const GALLERIES = ["txt2img_gallery", "img2img_gallery"];

    /** The files in what was dropped, folders opened: [[file, "folder/in it"]]. A folder's name says what its pictures are. */
    async function droppedFiles(transfer) {
        const entries = [...transfer.items].map((item) => item.webkitGetAsEntry && item.webkitGetAsEntry()).filter(Boolean);
        if (!entries.length) return [...transfer.files].map((file) => [file, ""]);
        const found = [];
        for (const entry of entries) await walk(entry, "", found);
        return found;
    }

    async function walk(entry, folder, found) {
        if (entry.isFile) {
            const file = await new Promise((resolve, reject) => entry.file(resolve, reject));
            if (!file.name.startsWith(".")) found.push([file, folder]);
            return;
        }
        const reader = entry.createReader();
        for (;;) {
            // A reader gives a hundred entries at a time, and none at the end.
            const some = await new Promise((resolve, reject) => reader.readEntries(resolve, reject));
            if (!some.length) return;
            for (const inner of some) await walk(inner, (folder ? folder + "/" : "") + entry.name, found);
        }
    }

    function nameFor(files) {
        const zip = files.find(([file]) => /\.zip$/i.test(file.name));
        const folder = files.map(([, folder]) => folder.split("/")[0]).find(Boolean);
        return zip ? zip[0].name.replace(/\.zip$/i, "") : folder || "pictures";
    }

    /** Pictures painted a moment ago that the WebUI still shows; grids of several are left out. */
    function lastGenerations() {
        const found = new Set();
        for (const id of GALLERIES) {
            const gallery = (typeof gradioApp === "function" ? gradioApp() : document).querySelector("#" + id);
            if (!gallery) continue;
            for (const image of gallery.querySelectorAll("img")) {
                const address = image.src.split("?")[0];
                const name = decodeURIComponent(address.split("/").pop());
                if (/[/]file=/.test(address) && !/^grid-/.test(name)) found.add(address);
            }
        }
        return [...found];
    }

    function adding(app) {
        const {once, translated} = studio.parts;

        /** A dataset of that name, or of a similar one where it is taken. What was written in the fields goes first. */
        async function ensureDataset(wished, trigger = "") {
            if (app.dataset()) return;
            const taken = new Set(app.view.state.datasets.map(({name}) => name.toLowerCase()));
            const first = app.newName || wished;
            let name = first;
            for (let number = 2; taken.has(name.toLowerCase()); number++) name = first + " " + number;
            await app.move(() => app.api.ask("create", {name, concept: app.newTrigger || trigger || app.newName || ""}));
        }

        /** Pictures that came in are looked at before anything else is done to them. */
        function importing(path, body) {
            app.leave("add");
            return app.start(path, body, (task) => (task.outcome === "failed" ? null : app.check()));
        }

        async function upload(files) {
            if (app.uploading) return app.say(translated("Pictures are being uploaded already; add these afterwards."), true);
            if (!files.length) return null;
            const batch = Date.now().toString(36) + Math.random().toString(36).slice(2, 8);
            const queue = files.map(([file, folder]) => [file, (folder ? folder + "/" : "") + file.name]);
            const total = queue.length;
            const refused = [];
            let sent = 0;
            const told = () => {
                app.uploaded = sent / total;
                app.uploading = translated`Uploading ${sent}/${total}`;
                app.draw();
            };
            const send = async() => {
                for (let next = queue.shift(); next; next = queue.shift()) {
                    const query = "upload?name=" + encodeURIComponent(next[1]) + "&batch=" + batch;
                    await app.api.send(query, next[0]).catch((error) => refused.push(next[1] + ": " + error.message));
                    sent += 1;
                    told();
                }
            };
            told();
            try {
                await ensureDataset(nameFor(files));
                await Promise.all(Array.from({length: UPLOADS}, send));
                if (refused.length === total) throw new Error(refused.slice(0, MOST_SAID).join(" "));
                const answer = await importing("import-uploads", {batch});
                if (refused.length) app.say(refused.slice(0, MOST_SAID).join(" "), true);
                return answer;
            } catch (error) {
                app.say(error.message, true);
                return null;
            } finally {
                app.uploading = "";
                app.draw();
            }
        }

        /** Have the server bring in what lies there; `name` and `trigger` are for a new dataset. */
        async function fromServer(path, body, name, trigger) {
            try {
                await ensureDataset(name, trigger);
            } catch (error) {
                return app.say(error.message, true);
            }
            return importing(path, body);
        }

        async function fromPath(path) {
            const clean = path.trim().replace(/^["']|["']$/g, "");
            if (!clean) return app.say(translated("Write the path of a folder, a picture or a zip file."), true);
            const parts = clean.split(/[\\/]/).filter(Boolean);
            return fromServer("import", {paths: [clean]}, (parts[parts.length - 1] || "pictures").replace(/\.zip$/i, ""));
        }

        const fromSamples = ({set, name, trigger}) => fromServer("import-samples", {name: set}, name, trigger);

        async function fromGenerations() {
            const addresses = lastGenerations();
            if (!addresses.length) return app.say(translated("There are no pictures in txt2img or img2img yet."), true);
            try {
                const files = await Promise.all(addresses.map(async(address) => {
                    const bytes = await (await fetch(address)).blob();
                    return [new File([bytes], decodeURIComponent(address.split("/").pop())), ""];
                }));
                return await upload(files);
            } catch (error) {
                return app.say(error.message, true);
            }
        }

        return {
            upload, fromPath: once(fromPath), fromGenerations: once(fromGenerations), fromSamples: once(fromSamples),
        };
    }

    /** The place to drop pictures on, with the other ways below it; sample pictures only while there are none. */
    function dropPlace(app) {
        const {make, button, textBox, icon, translated} = studio.parts;
        const picker = make("input", {
            type: "file", multiple: true, accept: TAKEN, class: "lts-hidden-input", id: "lora_train_upload",
            onchange: () => {
                const files = [...picker.files].map((file) => [file, ""]);
                picker.value = "";
                app.add.upload(files);
            },
        });
        let path = "";
        const box = textBox("", (text) => {
            path = text;
        }, {placeholder: "Folder, picture or zip on this computer", id: "lora_train_import_path", label: "Folder or zip"});
        box.addEventListener("keydown", (event) => {
            if (event.key !== "Enter" || event.ctrlKey || event.metaKey) return;
            event.preventDefault();
            app.add.fromPath(path);
        });
        const place = make("div", {class: "lts-drop", onclick: (event) => {
            if (!event.target.closest("button, input")) picker.click();
        }}, icon("picture"),
        make("b", {text: translated("Drop pictures here")}),
        make("span", {class: "lts-quiet", text: translated("pictures, a folder or a zip; the originals stay as they are")}),
        button("Choose pictures", () => picker.click(), {kind: "primary", drawn: "upload", id: "lora_train_choose"}), picker);
        const others = make("div", {class: "lts-line"}, box,
            button("Add", () => app.add.fromPath(path), {drawn: "folder", id: "lora_train_import"}));
        if (document.querySelector("#txt2img_gallery") || (typeof gradioApp === "function" &&
            gradioApp().querySelector("#txt2img_gallery"))) {
            others.append(button("From last generations", () => app.add.fromGenerations(), {
                drawn: "picture", id: "lora_train_generations", title: "The pictures that txt2img and img2img show",
            }));
        }
        const samples = make("div", {
            class: "lts-line lts-go", role: "group", "aria-label": translated("Try with sample pictures"),
        }, make("span", {class: "lts-quiet", text: translated("Try with sample pictures")}),
        ...SAMPLES.map((sample) => button(sample.words, () => app.add.fromSamples(sample), {
            drawn: "picture", id: "lora_train_sample_" + sample.set, title: sample.help,
        })));
        const draw = () => {
            samples.hidden = Boolean(app.dataset() && app.dataset().pictures);
        };
        return {element: make("div", {class: "lts-adding"}, place, others, samples), draw};
    }

    studio.dropPlace = dropPlace;

    /** The page before there is a dataset. */
    studio.welcome = function(app) {
        const {make, field, textBox, translated, icon, count} = studio.parts;
        app.add = adding(app);
        const known = make("div", {class: "lts-known"}), element = make("div", {class: "lts-welcome", hidden: true});
        let drawn = "";

        function fields() {
            const name = textBox("", (text) => {
                app.newName = text.trim();
            }, {placeholder: "my character", id: "lora_train_new_name"});
            const trigger = textBox("", (text) => {
                app.newTrigger = text.trim();
            }, {placeholder: "zzk girl", id: "lora_train_new_trigger"});
            return make("div", {class: "lts-line lts-new"},
                field("Name", name, "What the dataset is called. Empty takes the name of the folder."),
                field("Trigger word", trigger, "The word that will call up what is learnt. A made-up one works best."));
        }

        function draw() {
            const state = app.view.state, shown = Boolean(state && !state.dataset);
            if (shown === element.hidden) {
                element.hidden = !shown;
                app.newName = app.newTrigger = drawn = "";
                // The step "Pictures" has the same parts.
                element.replaceChildren(...(shown ? [fields(), dropPlace(app).element, known] : []));
            }
            const now = JSON.stringify(shown && state.datasets);
            if (!shown || now === drawn) return;
            drawn = now;
            known.hidden = !state.datasets.length;
            known.replaceChildren(make("h4", {text: translated("Go on with")}), make("div", {class: "lts-cards"},
                ...state.datasets.map((dataset) => make("button", {
                    type: "button", class: "lts-card",
                    onclick: () => app.enter({name: dataset.name}),
                }, icon("folder"), make("b", {translate: "no", text: dataset.name}),
                make("small", {text: count(dataset.pictures, "picture")})))));
        }

        return {element, draw};
    };

    /** Files may be dropped anywhere on the page. */
    studio.dropping = (app) => studio.parts.dropping(
        app.place, "lts-over", async(transfer) => app.add.upload(await droppedFiles(transfer)));
})(window.loraTrainStudio = window.loraTrainStudio || {});
