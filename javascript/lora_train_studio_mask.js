/* Painting the mask of a picture, for a training with masked loss: what is not to be learnt
 * lies red over the picture. The mask that is kept is white where the picture is learnt.
 */
(function(studio) {
    "use strict";
    const COVER = "#ff2020", NEARLY = 245, BRUSHES = [[0.02, "Fine"], [0.06, "Medium"], [0.15, "Broad"]];
    const idOf = (picture) => "?id=" + encodeURIComponent(picture.id);

    function canvas(picture) {
        return Object.assign(document.createElement("canvas"), {width: picture.width, height: picture.height});
    }

    /** The mask of `cover`: white, black where it is painted. */
    function maskOf(cover, picture) {
        const black = canvas(picture), ink = black.getContext("2d"), made = canvas(picture), paper = made.getContext("2d");
        ink.drawImage(cover, 0, 0);
        ink.globalCompositeOperation = "source-in";
        ink.fillStyle = "black";
        ink.fillRect(0, 0, picture.width, picture.height);
        paper.fillStyle = "white";
        paper.fillRect(0, 0, picture.width, picture.height);
        paper.drawImage(black, 0, 0);
        return new Promise((done) => made.toBlob(done, "image/png"));
    }

    /** Paint over `cover` what the mask in `blob` keeps from being learnt. */
    async function coverFrom(blob, cover) {
        const image = await createImageBitmap(blob), ink = cover.getContext("2d");
        ink.drawImage(image, 0, 0, cover.width, cover.height);
        const data = ink.getImageData(0, 0, cover.width, cover.height);
        for (let at = 0; at < data.data.length; at += 4) {
            // It comes as a JPEG, in which white is nearly white.
            const learnt = data.data[at], hidden = learnt > NEARLY ? 0 : learnt < 255 - NEARLY ? 255 : 255 - learnt;
            data.data.set([255, 32, 32, hidden], at);
        }
        ink.putImageData(data, 0, 0);
    }

    studio.maskPanel = function(app) {
        const {make, button, pills, translated} = studio.parts, picture = app.cropping;
        const image = make("img", {alt: picture.name, draggable: "false", translate: "no"}), cover = canvas(picture);
        cover.className = "lts-cover";
        cover.id = "lora_train_cover";
        const stage = make("div", {class: "lts-stage", id: "lora_train_stage"}, image, cover), ink = cover.getContext("2d");
        let brush = BRUSHES[1][0], erase = false, last = null;
        app.pictures.show(image, studio.picturePath(picture));
        if (picture.masked) {
            app.api.blob("mask" + idOf(picture)).then((blob) => coverFrom(blob, cover))
                .catch((error) => app.say(error.message, true));
        }

        function at(event) {
            const box = cover.getBoundingClientRect();
            const x = (event.clientX - box.left) / box.width, y = (event.clientY - box.top) / box.height;
            return [x * picture.width, y * picture.height];
        }

        function stroke(from, to) {
            ink.globalCompositeOperation = erase ? "destination-out" : "source-over";
            const width = brush * Math.max(picture.width, picture.height);
            Object.assign(ink, {strokeStyle: COVER, lineCap: "round", lineWidth: width});
            ink.beginPath();
            ink.moveTo(...from);
            ink.lineTo(...to);
            ink.stroke();
        }

        cover.addEventListener("pointerdown", (event) => {
            cover.setPointerCapture(event.pointerId);
            last = at(event);
            stroke(last, last);
            event.preventDefault();
        });
        cover.addEventListener("pointermove", (event) => {
            if (!last) return;
            const now = at(event);
            stroke(last, now);
            last = now;
        });
        for (const end of ["pointerup", "pointercancel"]) {
            cover.addEventListener(end, () => {
                last = null;
            });
        }

        function fill() {
            ink.globalCompositeOperation = "source-over";
            ink.fillStyle = COVER;
            ink.fillRect(0, 0, picture.width, picture.height);
        }

        async function keep() {
            const mask = await maskOf(cover, picture);
            const kept = await app.act(() => app.api.send("put-mask" + idOf(picture), mask),
                () => translated("The mask is kept beside the picture.") + " " + translated(studio.MASKS_USED));
            if (kept) close();
        }

        function close() {
            app.panel = app.cameFrom || "";
            app.draw();
        }

        const element = make("div", {},
            make("p", {class: "lts-quiet", id: "lora_train_masks_used", text: translated(studio.MASKS_USED)}),
            make("div", {class: "lts-line lts-go"}, make("b", {translate: "no", text: picture.name}),
                pills([[false, "Paint"], [true, "Wipe"]], false, (wipe) => {
                    erase = wipe;
                }, "Brush"), pills(BRUSHES, brush, (size) => {
                    brush = size;
                }, "Brush size"), button("Cover all", fill, {title: "Then wipe free what is to be learnt"})),
            stage,
            make("div", {class: "lts-line lts-go"},
                button("Keep the mask", keep, {kind: "primary", drawn: "check", id: "lora_train_mask_it"}),
                picture.masked ? button("Remove the mask", async() => {
                    if (await app.act(() => app.api.ask("remove-mask", {id: picture.id}))) close();
                }, {drawn: "remove", id: "lora_train_unmask"}) : null,
                button("Cancel", close)));
        return {element, draw: () => {}};
    };
})(window.loraTrainStudio = window.loraTrainStudio || {});
