/* A save given to others, on the page "3 Results": a folder for Civitai, or a repository on the Hugging Face hub. Asked for by "Share"
 * at a save; what is written stays while another save is chosen.
 */
(function(results) {
    "use strict";

    results.share = function(app) {
        const {make, button, field, textBox, choice, tick, translated} = window.loraTrainStudio.parts;
        const element = make("div", {class: "ltr-section", id: "lora_train_share", hidden: true});
        const wish = {name: "", huggingface_repo_id: "", huggingface_repo_visibility: "private", license: "", overwrite: false};
        let chosen = null, run = "", opener = null;

        const asked = (names) => ({run, save: chosen.id, ...Object.fromEntries(names.map((name) => [name, wish[name]]))});
        const box = (name, given) => textBox(wish[name], (text) => { wish[name] = text.trim(); }, given);

        const exported = () => app.act(() => app.page.api.ask("results/export", asked(["name"])), (made) => app.say(made.message));

        function pushed() {
            const visible = wish.huggingface_repo_visibility === "public";
            if (visible && !window.confirm(translated("Everybody will see this LoRA, its pictures and their prompts. Push it?"))) return null;
            return app.start("results/push", asked(Object.keys(wish)));
        }

        /** The keyboard goes back to the button that was pressed, or to the mark of its save. */
        function close() {
            const mark = app.place.querySelector(`[data-save="${CSS.escape(chosen.id)}"] .ltr-mark`);
            const again = opener.isConnected ? opener : opener.id && app.place.querySelector("#" + opener.id);
            chosen = null;
            draw();
            if (again || mark) (again || mark).focus();
        }

        /** The panel of a save, with the keyboard in it. */
        app.share = (save) => {
            if (run !== app.found.run) wish.name = app.found.name;
            [chosen, run, opener] = [save, app.found.run, document.activeElement];
            const name = box("name", {id: "lora_train_share_name"});
            element.replaceChildren(
                make("div", {class: "ltr-line"}, make("h4", {text: translated`Share ${results.saveName(app, save)}`}),
                    button("Close", close, {kind: "tool", drawn: "close", id: "lora_train_share_close"})),
                make("div", {class: "ltr-line ltr-share"}, field("Name", name, "What the LoRA is called there."),
                    button("Export for Civitai", exported, {drawn: "folder", id: "lora_train_export",
                        title: "A folder with the LoRA, its pictures and a description to upload, in the run's own folder."})),
                make("div", {class: "ltr-line ltr-share"},
                    field("Repository", box("huggingface_repo_id", {placeholder: "user/name", id: "lora_train_repository"}),
                        "On the Hugging Face hub; a new one is made. The login is that of huggingface-cli on the server."),
                    field("Visibility", choice([["private", translated("private")], ["public", translated("public")]],
                        wish.huggingface_repo_visibility, (value) => { wish.huggingface_repo_visibility = value; })),
                    field("License", box("license", {placeholder: "cc-by-nc-4.0"}), "Its short name on the hub; empty for none."),
                    tick("Overwrite", wish.overwrite, (value) => { wish.overwrite = value; },
                        "Also push into a repository that holds files; the hub keeps the old ones in its history."),
                    button("Push to Hugging Face", pushed, {drawn: "upload", id: "lora_train_push",
                        title: "The LoRA, its pictures and a page that says how it was trained."})));
            draw();
            element.scrollIntoView({block: "nearest"});
            name.focus();
        };

        function draw() {
            const there = chosen && app.found && app.found.run === run && app.found.saves.some((save) => save.id === chosen.id && save.exists);
            element.hidden = !there;
        }

        return {element, draw};
    };
})(window.loraTrainResults = window.loraTrainResults || {});
