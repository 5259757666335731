/* The loss of each training picture on the page "3 Results": those that were never learnt and those that were learnt at once, with
 * a way to each in the page "1 Dataset".
 */
(function(results) {
    "use strict";
    const MOST = 8, LITTLE = 0.25, MUCH = 2, DATASET = 0;

    const median = (values) => values.slice().sort((a, b) => a - b)[Math.floor(values.length / 2)];

    /** [{name, gain}] by how much of the base model's loss is gone, the least first; those that could not be told are left out. */
    function gains({images, losses, unadapted}) {
        return images.map((name, index) => ({name, gain: 1 - losses[index] / unadapted[index]}))
            .filter(({gain}) => Number.isFinite(gain)).sort((a, b) => a.gain - b.gain);
    }

    /** The two ends, as far as they stand out from the rest. */
    function outstanding(image_losses) {
        const all = gains(image_losses), middle = all.length ? median(all.map(({gain}) => gain)) : 0;
        if (all.length < 4 || middle <= 0) return {all, never: [], atOnce: []};
        return {
            all, never: all.filter(({gain}) => gain < LITTLE * middle).slice(0, MOST),
            atOnce: all.filter(({gain}) => gain > MUCH * middle).reverse().slice(0, MOST),
        };
    }

    results.outstanding = outstanding;

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
            const words = `${name}: ${percent(100 * gain)}`, face = make("span", {class: "ltr-name"}, make("b", {text: name}),
                make("small", {text: percent(100 * gain)}));
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
            const losses = app.found && app.found.image_losses;
            element.hidden = !losses;
            if (!losses) return;
            const now = JSON.stringify([app.found.run, losses, app.found.dataset]);
            if (now === known) return;
            known = now;
            const {all, never, atOnce} = outstanding(losses);
            element.hidden = !all.length;
            element.replaceChildren(make("h4", {
                text: translated("Training pictures"), title: translated("How much lower the loss of each is than the base model's, on fixed noise."),
            }), ...[
                list("Never learnt", "The LoRA does hardly better on them than the base model: a wrong caption, or a picture that is unlike the others.", never),
                list("Learnt at once", "Far better than the rest: a copy, a very simple picture, or too many repeats of it.", atOnce),
                never.length + atOnce.length ? null : make("p", {
                    class: "lts-quiet", text: `${translated("All of them are learnt alike")}: ${percent(100 * (all[0] || {gain: 0}).gain)} – ` +
                        percent(100 * (all[all.length - 1] || {gain: 0}).gain),
                })].filter(Boolean));
        }

        return {element, draw};
    };
})(window.loraTrainResults = window.loraTrainResults || {});
