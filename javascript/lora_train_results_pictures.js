/* The loss of each training picture on the page "3 Results": those that were never learnt and those that were learnt at once, with
 * a way to each in the page "1 Dataset".
 */
(function(results) {
    "use strict";
    const DATASET = 0;

    results.pictures = function(app) {
        const {make, translated} = window.loraTrainStudio.parts, {percent} = window.loraTrainChart;
        const element = make("div", {class: "ltr-section", hidden: true});
        let known = "";

        /** Go to the picture in the studio, whose dataset is opened where it is not. */
        async function show(name) {
            const studio = window.loraTrainStudio.app;
            app.page.turnTo(DATASET);
            await studio.poll();
            if ((studio.dataset() || {}).name !== app.found.dataset && !await studio.enter({name: app.found.dataset})) return;
            studio.find(name);
        }

        function entry({name: path, gain}) {
            // The studio's datasets have all of their pictures in one folder.
            const name = path.split("/").pop();
            const words = `${name}: ${percent(gain)}`, face = make("span", {class: "ltr-name", translate: "no"}, make("b", {text: name}),
                make("small", {text: percent(gain)}));
            if (!app.found.dataset) return make("li", {title: words}, face);
            const studio = window.loraTrainStudio.app, image = make("img", {alt: ""});
            // The studio has small pictures of the dataset that is open there.
            if ((studio.dataset() || {}).name === app.found.dataset) studio.pictures.show(image, "thumb?id=" + encodeURIComponent(name));
            return make("li", {}, make("button", {
                type: "button", class: "ltr-culprit", title: translated("Open it in the dataset"), onclick: () => show(name),
            }, image, face));
        }

        function list(title, help, entries) {
            return entries.length ? make("div", {class: "ltr-culprits"}, make("b", {text: translated(title), title: translated(help)}),
                make("ul", {}, ...entries.map(entry))) : null;
        }

        function draw() {
            const gains = app.found && app.found.image_gains;
            element.hidden = !gains || !gains.images.length;
            if (element.hidden) return;
            const now = JSON.stringify([app.found.run, gains, app.found.dataset]);
            if (now === known) return;
            known = now;
            const {images: all, never, at_once: atOnce} = gains;
            element.replaceChildren(make("h4", {
                text: translated("Training pictures"), title: translated("How much lower the loss of each is than the base model's, on fixed noise."),
            }), ...[
                list("Never learnt", "The LoRA does hardly better on them than the base model: a wrong caption, or a picture that is unlike the others.", never),
                list("Learnt at once", "Far better than the rest: a copy, a very simple picture, or too many repeats of it.", atOnce),
                never.length + atOnce.length ? null : make("p", {
                    class: "lts-quiet", text: translated`All of them are learnt alike: ${percent(all[0].gain)} – ${percent(all[all.length - 1].gain)}`,
                })].filter(Boolean));
        }

        return {element, draw};
    };
})(window.loraTrainResults = window.loraTrainResults || {});
