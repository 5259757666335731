/* Cropping and sizing: for many at once with the results shown before anything is written, and by hand on one picture. */
(function(studio) {
    "use strict";
    const SAMPLES = 8, PREVIEW_MS = 300;
    const MODES = [
        ["buckets", "Keep their shapes", "Portrait stays portrait; as little as possible is cut off"],
        ["square", "Squares", "Every picture a square"],
        ["keep", "Only make smaller", "Nothing is cut off"],
    ];
    const FOCUS = [["subject", "On the subject", "Where the face is, or what stands out"], ["centre", "In the middle"]];

    studio.shapePanel = function(app) {
        const {make, button, pills, field, tick, later, translated} = studio.parts;
        const shape = {mode: "buckets", side: app.side || 512, focus: "subject", enlarge: false};
        const samples = make("div", {class: "lts-samples", id: "lora_train_samples"});
        const run = button("Crop", () => app.start("shape", {...app.scope(), shape}, () => {
            app.leave("shape");
            return app.check();
        }), {kind: "primary", drawn: "crop", id: "lora_train_shape"});
        const back = button("Undo cropping", () => app.act(async() => {
            const ids = app.view.selected.size ? [...app.view.selected] :
                app.view.shown.pictures.filter((picture) => picture.shaped).map(({id}) => id);
            await app.api.ask("unshape", {ids});
        }, "As they were brought in."), {drawn: "back", id: "lora_train_unshape"});
        const change = (name) => (value) => {
            shape[name] = value;
            if (name === "side") app.side = value;
            drawSoon();
        };
        const element = make("div", {},
            make("div", {class: "lts-line"},
                field("Size", pills([[512, "512", "SD 1.5"], [768, "768", "SD 2"], [1024, "1024", "SDXL"]], shape.side,
                    change("side"), "Size")),
                field("Shape", pills(MODES, shape.mode, change("mode"), "Shape")),
                field("Cut", pills(FOCUS, shape.focus, change("focus"), "Cut")),
                tick("Enlarge small ones", false, change("enlarge"), "Blown up they look soft; without this they stay small.")),
            samples, make("div", {class: "lts-line lts-go"}, run, back));
        let addresses = [], number = 0, known = "";

        /** What would come of the first few pictures. */
        async function drawSamples() {
            const mine = ++number, {selected, shown} = app.view;
            const chosen = shown.pictures.filter(({id, problems}) => (!selected.size || selected.has(id)) &&
                !problems.includes("broken")).slice(0, SAMPLES);
            const made = [];
            samples.classList.add("lts-waiting");
            for (const picture of chosen) {
                try {
                    const address = URL.createObjectURL(await app.api.blob("shape-preview", {id: picture.id, shape}));
                    made.push([picture, address]);
                } catch (error) {
                    app.say(error.message, true);
                    break;
                }
                if (mine !== number) return made.forEach(([, address]) => URL.revokeObjectURL(address));
            }
            addresses.forEach((address) => URL.revokeObjectURL(address));
            addresses = made.map(([, address]) => address);
            samples.classList.remove("lts-waiting");
            samples.replaceChildren(...made.map(([picture, address]) => {
                const image = make("img", {src: address, alt: picture.name, translate: "no"});
                const size = make("span", {class: "lts-quiet"});
                image.addEventListener("load", () => {
                    size.textContent = image.naturalWidth + "×" + image.naturalHeight;
                });
                return make("button", {
                    type: "button", class: "lts-sample", title: translated("Crop this one by hand"),
                    onclick: () => app.cropByHand(picture),
                }, image, size);
            }));
            return null;
        }
        const drawSoon = later(drawSamples, PREVIEW_MS);

        function draw() {
            const {selected, shown} = app.view;
            run.disabled = app.working() || !app.scopeSize();
            run.lastChild.textContent = translated`Crop ${app.scopeWords()}`;
            back.hidden = !shown.pictures.some((picture) => picture.shaped && (!selected.size || selected.has(picture.id)));
            const now = JSON.stringify([[...selected], shown.pictures.slice(0, SAMPLES).map(({id, stamp}) => [id, stamp])]);
            if (now === known) return;
            known = now;
            drawSoon();
        }

        return {element, draw, close: () => {
            number += 1;
            addresses.forEach((address) => URL.revokeObjectURL(address));
        }};
    };

    // ---- by hand ---------------------------------------------------------------------------------------------------

    const SHAPES = [[0, "Free"], [1, "1:1"], [3 / 4, "3:4"], [4 / 3, "4:3"], [2 / 3, "2:3"], [3 / 2, "3:2"]];
    const LEAST = 16;

    studio.cropPanel = function(app) {
        const {make, button, pills, translated} = studio.parts, picture = app.cropping;
        const image = make("img", {alt: picture.name, draggable: "false", translate: "no"});
        const box = make("div", {class: "lts-cut", tabindex: "0", "aria-label": translated("What is kept")},
            ...["nw", "ne", "sw", "se"].map((corner) => make("i", {"data-corner": corner})));
        const stage = make("div", {class: "lts-stage", id: "lora_train_stage"}, image, box);
        const size = make("b", {class: "lts-count"});
        const kept = {left: 0, top: 0, right: picture.width, bottom: picture.height};
        let ratio = 0, held = null;
        app.pictures.show(image, studio.picturePath(picture));

        const element = make("div", {},
            make("div", {class: "lts-line lts-go"}, make("b", {translate: "no", text: picture.name}), pills(SHAPES, 0, (chosen) => {
                ratio = chosen;
                if (ratio) fit();
                show();
            }, "Shape"), size),
            stage,
            make("div", {class: "lts-line lts-go"},
                button("Crop", async() => {
                    const {left, top, right, bottom} = kept;
                    const done = await app.act(() => app.api.ask("crop", {id: picture.id, box: [left, top, right, bottom]}));
                    if (done) close();
                }, {kind: "primary", drawn: "crop", id: "lora_train_crop_it"}),
                button("Cancel", close)));

        function close() {
            app.panel = app.cameFrom || "";
            app.draw();
        }

        /** The largest box of the ratio around the same middle. */
        function fit() {
            const width = Math.min(picture.width, picture.height * ratio), height = width / ratio;
            const x = (kept.left + kept.right) / 2, y = (kept.top + kept.bottom) / 2;
            kept.left = Math.round(Math.min(picture.width - width, Math.max(0, x - width / 2)));
            kept.top = Math.round(Math.min(picture.height - height, Math.max(0, y - height / 2)));
            kept.right = Math.round(kept.left + width);
            kept.bottom = Math.round(kept.top + height);
        }

        function show() {
            const percent = (part, whole) => (100 * part / whole).toFixed(3) + "%";
            box.style.left = percent(kept.left, picture.width);
            box.style.top = percent(kept.top, picture.height);
            box.style.width = percent(kept.right - kept.left, picture.width);
            box.style.height = percent(kept.bottom - kept.top, picture.height);
            size.textContent = (kept.right - kept.left) + "×" + (kept.bottom - kept.top);
        }

        const clamp = (value, low, high) => Math.round(Math.min(high, Math.max(low, value)));

        function moveBy(start, dx, dy) {
            const width = start.right - start.left, height = start.bottom - start.top;
            kept.left = clamp(start.left + dx, 0, picture.width - width);
            kept.top = clamp(start.top + dy, 0, picture.height - height);
            kept.right = kept.left + width;
            kept.bottom = kept.top + height;
        }

        function pull(start, corner, dx, dy) {
            const east = corner.includes("e"), south = corner.includes("s");
            const anchorX = east ? start.left : start.right, anchorY = south ? start.top : start.bottom;
            const roomX = east ? picture.width - anchorX : anchorX, roomY = south ? picture.height - anchorY : anchorY;
            let width = clamp((start.right - start.left) + (east ? dx : -dx), LEAST, roomX);
            let height = clamp((start.bottom - start.top) + (south ? dy : -dy), LEAST, roomY);
            if (ratio) {
                width = Math.min(width, roomX, Math.floor(roomY * ratio));
                height = Math.round(width / ratio);
            }
            kept.left = east ? anchorX : anchorX - width;
            kept.right = kept.left + width;
            kept.top = south ? anchorY : anchorY - height;
            kept.bottom = kept.top + height;
        }

        stage.addEventListener("pointerdown", (event) => {
            if (!event.target.closest(".lts-cut")) return;
            held = {x: event.clientX, y: event.clientY, start: {...kept}, corner: event.target.dataset.corner || ""};
            stage.setPointerCapture(event.pointerId);
            event.preventDefault();
            box.focus({preventScroll: true});
        });
        stage.addEventListener("pointermove", (event) => {
            if (!held) return;
            const scale = picture.width / image.clientWidth;
            const dx = (event.clientX - held.x) * scale, dy = (event.clientY - held.y) * scale;
            if (held.corner) {
                pull(held.start, held.corner, dx, dy);
            } else {
                moveBy(held.start, dx, dy);
            }
            show();
        });
        for (const end of ["pointerup", "pointercancel"]) {
            stage.addEventListener(end, () => {
                held = null;
            });
        }
        box.addEventListener("keydown", (event) => {
            const step = event.ctrlKey ? 1 : Math.max(1, Math.round(picture.width / 50));
            const by = {ArrowLeft: [-step, 0], ArrowRight: [step, 0], ArrowUp: [0, -step], ArrowDown: [0, step]}[event.key];
            if (!by) return;
            event.preventDefault();
            if (event.shiftKey) {
                pull({...kept}, "se", ...by);
            } else {
                moveBy({...kept}, ...by);
            }
            show();
        });
        show();
        return {element, draw: () => {}};
    };

    /** Open the picture for a crop by hand; the panel that was open comes back afterwards. */
    studio.cropping = function(app) {
        const byHand = (panel) => (picture) => {
            app.cropping = picture;
            app.cameFrom = ["crop", "mask"].includes(app.panel) ? "" : app.panel;
            app.panel = "";
            app.draw();
            app.show(panel);
        };
        app.cropByHand = byHand("crop");
        app.maskByHand = byHand("mask");
    };
})(window.loraTrainStudio = window.loraTrainStudio || {});
