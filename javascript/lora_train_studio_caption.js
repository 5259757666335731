/* Captions: who writes them, with which options; and whether they fit, painted by the model beside the picture. */
(function(studio) {
    "use strict";
    const SEEDS = 2;
    const MODES = {
        overwrite: "Replace what is there", prepend: "Put in front of it", append: "Put behind it",
        only_empty: "Only where there is none",
    };
    /** Which options mean something to a source that needs no model. */
    const ONLY_FOR = {template: ["template"], general_threshold: ["wd", "deepdanbooru"], character_threshold: ["wd"]};

    studio.captionPanel = function(app) {
        const {make, button, field, tick, textBox, numberBox, choice, translated} = studio.parts;
        const sources = make("div", {
            class: "lts-sources", role: "radiogroup", "aria-label": translated("Who writes the captions"),
        });
        const options = make("div", {class: "lts-line lts-options"}), more = make("details", {class: "lts-more"},
            make("summary", {text: translated("More options")}));
        const moreFields = more.appendChild(make("div", {class: "lts-line lts-options"}));
        const run = button("Caption", start, {kind: "primary", drawn: "caption", id: "lora_train_tag"});
        const check = button("Do they fit?", () => app.checkCaptions(), {
            drawn: "search", id: "lora_train_check_captions", title: "Paint from the captions and compare with the pictures; " +
                "the worst come first",
        });
        const legend = make("p", {class: "lts-quiet", text: translated(
            "Each picture, what the model paints from its caption, how well the caption fits and how alike they look, of 100. " +
            "The worst first.")});
        const need = make("p", {class: "lts-need", role: "status"});
        const results = make("div", {class: "lts-checked"}), othersList = make("ul", {class: "lts-problems"});
        const others = make("details", {class: "lts-more"}, make("summary", {text: translated("Others, and what they need")}),
            othersList);
        const element = make("div", {}, sources, need, options, more, others,
            make("div", {class: "lts-line lts-go"}, run, check), legend, results);
        let declared = null, known = "";
        const values = app.tagValues;

        app.api.ask("tag-options").then((answer) => {
            declared = answer.options;
            for (const {name, default: first} of declared) {
                if (!(name in values)) values[name] = first;
            }
            if (!values.trigger_word) values.trigger_word = app.dataset().trigger_word;
            // Captions that came with the pictures are not written over unless that is asked for.
            const {empty} = app.view, some = empty > 0 && empty < app.dataset().pictures;
            if (!app.modeChosen) values.mode = some ? "only_empty" : declared.find(({name}) => name === "mode").default;
            known = "";
            draw();
        }).catch((error) => app.say(error.message, true));

        /** A WD tagger may be fetched, but only by somebody who said so. */
        const fetched = ({name}) => name.startsWith("wd") && declared && declared.some((option) => option.name === "download");
        const usable = (source) => !source.missing || (fetched(source) && values.download);

        const looks = ({reads}) => reads === "pixels";

        /** The one that was chosen, else one that looks at the picture, else file names. */
        function chosen() {
            const all = app.view.state.sources, ready = all.filter(usable);
            return all.find(({name}) => name === app.source) || ready.find(looks) ||
                ready.find(({name}) => name === "filename") || ready[0];
        }

        function drawSources() {
            const current = chosen(), all = app.view.state.sources;
            // What looks at the pictures is worth a step more; it is shown beside what is ready.
            const shown = all.filter((source) => usable(source) || looks(source)), absent = all.filter((one) => !shown.includes(one));
            sources.replaceChildren(...shown.map((source) => make("button", {
                type: "button", class: "lts-source" + (usable(source) ? "" : " lts-absent"), role: "radio",
                "data-source": source.name, title: source.missing ? translated(source.missing) : null,
                "aria-checked": String(Boolean(current) && source.name === current.name), onclick: () => {
                    app.source = source.name;
                    draw();
                },
            }, translated(source.label), usable(source) ? null : make("small", {text: translated("not here yet")}))));
            const lacking = current && !usable(current);
            need.hidden = !lacking;
            need.replaceChildren(...(lacking ? [translated(current.missing), fetched(current) ? button("Download it", () => {
                values.download = true;
                known = "";
                draw();
            }, {title: "About 400 MB from huggingface.co, when captioning begins", id: "lora_train_download"}) : ""] : []));
            others.hidden = !absent.length;
            othersList.replaceChildren(...absent.map((source) => make("li", {},
                make("b", {text: translated(source.label)}), " ", translated(source.missing))));
        }

        function control(option) {
            const {name, type, label, help} = option, set = (value) => {
                values[name] = value;
                app.modeChosen = app.modeChosen || name === "mode";
            };
            const id = "lora_train_tag_" + name;
            if (type === "bool") return tick(label, values[name], set, help);
            if (option.choices && option.choices.length) {
                const choices = option.choices.map((value) => [value, translated(MODES[value] || value)]);
                return field(label, choice(choices, values[name], set, {id}), help);
            }
            if (type === "str") return field(label, textBox(values[name], set, {id}), help);
            return field(label, numberBox(values[name], set, {
                minimum: option.minimum, maximum: option.maximum, step: option.step || (type === "int" ? 1 : "any"), id,
            }), help);
        }

        function drawOptions() {
            if (!declared) return;
            const current = chosen(), of = current ? current.name : "";
            const fits = ({name}) => !ONLY_FOR[name] || ONLY_FOR[name].some((start) => of.startsWith(start));
            const used = declared.filter(fits);
            const inView = (option) => option.in_view || (option.name === "template" && of === "template");
            options.replaceChildren(...used.filter(inView).map(control));
            moreFields.replaceChildren(...used.filter((option) => !inView(option)).map(control));
            more.hidden = !moreFields.childElementCount;
        }

        function start() {
            const source = chosen();
            if (!source) return null;
            return app.start("tag", {source: source.name, options: values, ...app.scope()}, (task) => {
                if (task.outcome !== "failed") app.leave("caption");
                app.draw();
            });
        }

        function drawResults() {
            const scored = app.view.shown.pictures.filter(({score, painted}) => typeof score === "number" && painted);
            legend.hidden = !scored.length;
            results.replaceChildren(...scored.slice().sort((a, b) => a.score - b.score).slice(0, 12).map((picture) => {
                const original = make("img", {alt: picture.name, translate: "no"});
                app.pictures.show(original, studio.thumbPath(picture));
                const painted = Array.from({length: picture.painted}, (_, n) => {
                    const image = make("img", {alt: translated("Painted from the caption")});
                    app.pictures.show(image, "checked?id=" + encodeURIComponent(picture.id) + "&n=" + n + "&of=" +
                        encodeURIComponent(picture.caption));
                    return image;
                });
                return make("button", {
                    type: "button", class: "lts-pair", translate: "no", title: picture.caption, onclick: () => app.select([picture.id]),
                }, original, ...painted, make("b", {text: Math.round(picture.score) + " · " + Math.round(picture.likeness)}));
            }));
        }

        function draw() {
            const current = chosen();
            // Before the options are known a caption would be written without the trigger word.
            run.disabled = !declared || app.working() || !current || !usable(current) || !app.scopeSize();
            check.disabled = app.working() || !app.scopeSize();
            run.lastChild.textContent = translated`Caption ${app.scopeWords()}`;
            const now = JSON.stringify([app.view.state.sources, current && current.name,
                app.view.shown.pictures.map(({id, score, painted}) => [id, score, painted])]);
            if (now === known) return;
            known = now;
            drawSources();
            drawOptions();
            drawResults();
        }

        return {element, draw};
    };

    studio.captioning = function(app) {
        /** Have the model paint from the captions of these pictures, or of the scope; the worst are shown first. */
        app.checkCaptions = (ids) => app.start("check-captions", {
            ...(ids ? {ids} : app.scope()), seeds: SEEDS, settings: app.sizes(),
        }, (task) => {
            if (task.outcome === "failed") return;
            app.view.sort = "score";
            app.show("caption");
            app.turn(0);
        });
    };
})(window.loraTrainStudio = window.loraTrainStudio || {});
