/* One picture, large: its caption with the count of tokens, what is wrong with it, and what can be done to it. */
(function(studio) {
    "use strict";
    const TOKENS_MS = 350, CHUNK = 75;

    studio.editor = function(app) {
        const {make, button, count, later, translated} = studio.parts;
        const image = make("img", {class: "lts-large", translate: "no"}), name = make("b", {class: "lts-file", translate: "no"});
        const about = make("span", {class: "lts-quiet"}), wrong = make("div", {class: "lts-wrong"});
        const caption = make("textarea", {
            class: "lts-input", rows: "4", id: "lora_train_caption", "aria-label": translated("Caption"),
            placeholder: translated("What is to be seen, as you would prompt for it"), spellcheck: "false",
        });
        const tokens = make("span", {class: "lts-tokens"});
        const frame = make("div", {class: "lts-frame"}, image);
        const tools = make("div", {class: "lts-line lts-tools"});
        const element = make("div", {class: "lts-editor", hidden: true},
            make("div", {class: "lts-editor-head"}, make("span", {}, name, " ", about),
                button("Close", () => app.select([]), {kind: "tool", drawn: "close"})),
            frame, make("div", {class: "lts-editor-text"}, wrong, caption, tokens, tools));
        let shown = null, known = "", counted = "";

        /** Hand the text to the server when the field is left; nothing is written to the disk before Save. */
        async function keep() {
            if (!shown || caption.value === shown.caption) return;
            const {id} = shown;
            shown = {...shown, caption: caption.value};
            app.unsent.set(id, caption.value);
            await send(id);
        }

        /** What the server refuses stays, and is sent again by `app.resend`. */
        async function send(id) {
            const text = app.unsent.get(id);
            await app.act(async() => {
                await app.api.ask("caption", {id, text});
                if (app.unsent.get(id) === text) app.unsent.delete(id);
            });
        }

        /** Send what was refused; whether nothing is left of it. */
        app.resend = async() => {
            for (const id of [...app.unsent.keys()]) await send(id);
            return !app.unsent.size;
        };

        async function countTokens() {
            const text = caption.value;
            try {
                const {tokens: number, chunks} = await app.api.ask("tokens", {text});
                if (text !== caption.value) return;
                tokens.textContent = count(number, "token");
                tokens.classList.toggle("lts-problem", number > CHUNK);
                tokens.title = chunks > 1 ? translated("More than one chunk of 75 tokens.") : "";
            } catch (error) {
                tokens.textContent = "";
            }
        }
        const countSoon = later(countTokens, TOKENS_MS);

        caption.addEventListener("input", countSoon);
        caption.addEventListener("change", () => {
            app.written = keep();
        });
        caption.addEventListener("keydown", (event) => {
            if (event.key === "Escape") {
                if (shown) app.unsent.delete(shown.id);
                caption.value = shown ? shown.caption : "";
                caption.blur();
            }
            // A caption is one line; Enter goes on to the next picture.
            if (event.key !== "Enter") return;
            event.preventDefault();
            if (event.ctrlKey || event.metaKey) return;
            const ids = app.view.shown.pictures.map(({id}) => id), next = ids[ids.indexOf(app.view.current) + 1];
            app.written = keep();
            if (next) {
                app.select([next]);
                caption.focus();
            }
        });

        function drawPicture(picture) {
            name.textContent = picture.name;
            about.textContent = picture.width ? picture.width + "×" + picture.height : "";
            const why = picture.caption_problem, unread = picture.problems.includes("unreadable_caption");
            wrong.replaceChildren(make("b", {text: studio.problemWords(picture.problems)}),
                make("div", {text: translated(picture.why)}),
                // What is odd about a caption that can be read is no problem.
                make("div", {class: unread ? null : "lts-quiet", text: translated(why)}),
                picture.held_out ? make("div", {class: "lts-quiet", text: translated(studio.HELD_OUT)}) : "",
                picture.masked ? make("div", {class: "lts-quiet", text: translated(studio.MASKS_USED)}) : "");
            wrong.hidden = !picture.problems.length && !why && !picture.masked && !picture.held_out;
            image.alt = picture.name;
            image.removeAttribute("src");
            frame.classList.toggle("lts-broken", picture.problems.includes("broken"));
            if (!picture.problems.includes("broken")) {
                app.pictures.show(image, studio.picturePath(picture), () => frame.classList.add("lts-broken"));
            }
            const ask = (path, body) => app.act(() => app.api.ask(path, {id: picture.id, ...body}));
            tools.replaceChildren(...[
                button("Crop", () => app.cropByHand(picture), {drawn: "crop", id: "lora_train_crop", title: "Crop by hand"}),
                button("Flip", () => ask("flip", {}), {drawn: "flip", title: "Mirror the picture"}),
                button("Mask", () => app.maskByHand(picture), {
                    drawn: "picture", id: "lora_train_mask", title: "Paint over what is not to be learnt. " +
                        "It counts where Masked loss (masked_loss) is on"}),
                button("Split", () => ask("split", {}), {drawn: "split", title: "Cut a large picture into several"}),
                picture.shaped ? button("Uncrop", () => app.act(() => app.api.ask("unshape", {ids: [picture.id]})), {
                    drawn: "back", title: "The picture as it was brought in"}) : null,
                button("Fits?", () => app.checkCaptions([picture.id]), {
                    drawn: "search", title: "Paint from the caption and compare with the picture"}),
                app.holdOutButton([picture.id], [picture]),
                button("Remove", () => app.remove([picture.id]), {drawn: "remove", title: "Delete"}),
            ].filter(Boolean));
        }

        function draw() {
            const picture = app.view.selected.size <= 1 ? app.current() : null;
            element.hidden = !picture;
            if (!picture) {
                shown = null;
                known = "";
                return;
            }
            const other = !shown || shown.id !== picture.id;
            const writing = document.activeElement === caption && !other && caption.value !== shown.caption;
            if (!writing) caption.value = app.unsent.has(picture.id) ? app.unsent.get(picture.id) : picture.caption;
            shown = writing ? {...shown} : picture;
            const now = JSON.stringify([picture.id, picture.stamp, picture.problems, picture.why,
                picture.caption_problem, picture.shaped, picture.masked, picture.held_out,
                app.dataset().held_out]);
            if (now !== known) {
                known = now;
                drawPicture(picture);
            }
            if (other || counted !== caption.value) {
                counted = caption.value;
                countSoon();
            }
        }

        return {element, draw};
    };
})(window.loraTrainStudio = window.loraTrainStudio || {});
