/* The panel below the steps: one at a time, made when it is opened, with the step's one big button in it. */
(function(studio) {
    "use strict";

    studio.panels = function(app) {
        const {make, button, translated} = studio.parts;
        const element = make("div", {class: "lts-panel", hidden: true});
        const makers = {
            add: () => studio.dropPlace(app), check: () => studio.reportPanel(app), shape: () => studio.shapePanel(app),
            caption: () => studio.captionPanel(app), train: () => studio.trainPanel(app),
            crop: () => studio.cropPanel(app), mask: () => studio.maskPanel(app),
        };
        let open = "", panel = null, folder = "";

        /** Open a panel and bring it into sight. */
        app.show = (name) => {
            app.panel = name;
            app.draw();
            element.scrollIntoView({block: "nearest", behavior: "smooth"});
        };

        function draw() {
            const dataset = app.dataset();
            if (dataset && dataset.folder !== folder) {
                folder = dataset.folder;
                open = "";
                if (!dataset.pictures) app.panel = "add";
            }
            const wanted = dataset ? app.panel : "";
            if (wanted !== open || (wanted && !panel)) {
                open = wanted;
                if (panel && panel.close) panel.close();
                panel = wanted ? makers[wanted]() : null;
                element.dataset.panel = wanted;
                element.replaceChildren(...(panel ? [panel.element, button("Close", () => app.open(wanted), {
                    kind: "tool", drawn: "close", title: translated("Close")})] : []));
            }
            element.hidden = !panel;
            if (panel) panel.draw();
        }

        return {element, draw};
    };

    // ---- 2 Check ---------------------------------------------------------------------------------------------------

    const COUNTED = {
        broken: "cannot be used", duplicate: "nearly the same as another", small: "too small", blurry: "too blurry",
        narrow: "very narrow", unreadable_caption: "with a caption that cannot be read",
        deep_crop: "cut deep by the crop", no_caption: "without caption", empty_caption: "with an empty caption",
        long_caption: "with a long caption",
    };

    studio.reportPanel = function(app) {
        const {make, button, translated, count} = studio.parts;
        const told = make("div", {class: "lts-report"}), crops = make("div", {class: "lts-crops"});
        const look = button("Look again", () => app.check(), {kind: "primary", drawn: "search", id: "lora_train_check"});
        const show = button("Show what crops cut off", showCrops, {drawn: "crop", id: "lora_train_crops"});
        const nextStep = () => studio.steps(app).find((step) => step.next);
        const go = button("Next", () => app.show(nextStep().id), {kind: "primary", drawn: "right", id: "lora_train_next"});
        const element = make("div", {}, told, crops, make("div", {class: "lts-line lts-go"}, go, look, show));
        let known = "", address = "";

        async function showCrops() {
            try {
                const blob = await app.api.blob("crops");
                URL.revokeObjectURL(address);
                address = URL.createObjectURL(blob);
                crops.replaceChildren(make("p", {class: "lts-quiet", text:
                    translated("What is dark is cut off when the picture is trained as it is.")}),
                make("img", {src: address, alt: translated("What crops cut off")}));
            } catch (error) {
                app.say(error.message, true);
            }
        }

        function draw() {
            const report = app.dataset().report;
            look.disabled = app.working();
            show.hidden = go.hidden = !report;
            go.lastChild.textContent = translated`Next: ${translated(nextStep().name)}`;
            const now = JSON.stringify(report);
            if (now === known) return;
            known = now;
            look.lastChild.textContent = translated(report ? "Look again" : "Look at the pictures");
            look.classList.toggle("lts-primary", !report || !report.fresh);
            if (!report) {
                told.replaceChildren(make("p", {text: translated(
                    "Finds duplicates, blurry, small and broken pictures, and says what to mend first.")}));
                return;
            }
            const chips = Object.entries(report.counts).filter(([, number]) => number > 0).map(([code, number]) => make(
                "button", {
                    type: "button", class: "lts-chip", title: translated("Show them"), onclick: () => {
                        app.open("check");
                        app.unfilter({problem: code});
                    },
                }, make("b", {text: number}), " " + translated(COUNTED[code] || code)));
            told.replaceChildren(
                make("p", {class: "lts-summary", text: translated(report.summary)}),
                chips.length ? make("div", {class: "lts-chips"}, ...chips) :
                    make("p", {class: "lts-fine", text: translated("Nothing to mend.")}),
                make("ol", {class: "lts-advice"}, ...report.advice.map((text) => make("li", {text: translated(text)}))));
        }

        return {element, draw, close: () => URL.revokeObjectURL(address)};
    };

    const QUIET_MS = 3000;

    /** Have the dataset looked at; the report opens when it says something, unless another panel was opened meanwhile. */
    studio.checking = function(app) {
        let tried = -1;
        app.check = () => app.start("check", {settings: app.sizes()}, (task) => {
            if (task.outcome !== "done") return;
            app.leave("add");  // an empty dataset opens it by itself
            app.panel = app.panel || "check";
            app.draw();
        });

        /** What was found in other pictures or captions is looked at anew, in the background, once nothing has changed for a
         * moment; once for each change. */
        app.checkAnew = async({dataset, task, training, version}) => {
            const old = dataset && dataset.pictures && dataset.report && !dataset.report.fresh;
            if (!old || training || (task && task.running) || tried === version || Date.now() - app.changedAt < QUIET_MS) return;
            tried = version;
            try {
                await app.api.ask("check", {background: true, settings: app.sizes()});
                setTimeout(app.poll, QUIET_MS / 3);
            } catch (error) { /* busy: the next change of the state asks */ }
        };
    };

    // ---- 5 Train ---------------------------------------------------------------------------------------------------

    studio.trainPanel = function(app) {
        const {make, button, count, translated, field, numberBox, textBox} = studio.parts;
        const about = make("div", {class: "lts-report"});
        const use = button("Use for training", useIt, {kind: "primary", drawn: "train", id: "lora_train_use"});
        const classes = {prompt: "", count: 20, size: 512};
        const classPart = make("details", {class: "lts-more"},
            make("summary", {text: translated("Preservation pictures")}),
            make("p", {class: "lts-quiet", text: translated(
                "Pictures of the general kind, painted by the loaded model, keep it from forgetting what it knows. " +
                "Most LoRAs do without.")}),
            make("div", {class: "lts-line"},
                field("Prompt", textBox("", (text) => {
                    classes.prompt = text;
                }, {placeholder: "a photo of a girl", id: "lora_train_class_prompt"})),
                field("Pictures", numberBox(classes.count, (number) => {
                    classes.count = number;
                }, {minimum: 1, maximum: 1000})),
                field("Size", numberBox(classes.size, (number) => {
                    classes.size = number;
                }, {minimum: 64, maximum: 2048, step: 64})),
                button("Paint them", paint, {id: "lora_train_class_pictures"})));
        const element = make("div", {}, about, make("div", {class: "lts-line lts-go"}, use), classPart);
        let known = "";

        function paint() {
            const prompts = classes.prompt.split("\n").map((line) => line.trim()).filter(Boolean);
            if (!prompts.length) return app.say(translated("Write what the pictures should show."), true);
            return app.start("class-pictures", {prompts, count: classes.count, size: classes.size}, (task) => {
                const folder = task.result.reg_data_dir;
                if (folder) fillFields({reg_data_dir: folder});
            });
        }

        async function useIt() {
            const answer = await app.act(() => app.api.ask("use", {}));
            if (!answer) return;
            const trained = typed("train_data_dir");
            // A name for this dataset's LoRA stays; that of another dataset's would be overwritten.
            const named = typed("output_name") && (!trained || trained === answer.train_data_dir);
            fillFields(named ? answer : {output_name: app.dataset().name, ...answer});
            app.panel = "";
            app.turnTo(1);
        }

        function typed(name) {
            const box = document.querySelector("#lora_train_" + name + " input, #lora_train_" + name + " textarea");
            return box ? box.value.trim() : "";
        }

        /** Into the fields of the other page, which have the settings' names. */
        async function fillFields(values) {
            await window.loraTrain.page.restored;
            for (const [name, value] of Object.entries(values)) {
                const part = document.querySelector("#lora_train_" + name);
                const box = part && part.querySelector("input:not([type=checkbox]), textarea");
                // A 0 that stands for "auto" is an empty field.
                const text = value === 0 && box && box.placeholder ? "" : String(value);
                if (box && value !== null && typeof value !== "object") window.loraTrain.setText(box, text);
            }
            window.loraTrain.planSoon();
        }

        function draw() {
            const dataset = app.dataset(), report = dataset.report, proposal = report && report.proposal;
            use.disabled = app.working();
            const now = JSON.stringify([dataset, app.view.empty]);
            if (now === known) return;
            known = now;
            const lines = [];
            if (proposal) {
                const by = " × ", pictures = count(proposal.pictures, "picture");
                lines.push(pictures + by + count(proposal.repeats, "repeat") + by + count(proposal.epochs, "epoch") +
                    " / " + proposal.batch + " = " + count(proposal.steps, "step"));
            } else {
                lines.push(count(dataset.pictures - dataset.held_out.pictures, "picture"));
            }
            if (dataset.held_out.pictures) {
                const {pictures} = dataset.held_out;
                lines.push(pictures === 1 ? translated("1 more picture to measure on, held out of training.") :
                    translated`${pictures} more pictures to measure on, held out of training.`);
            }
            if (app.view.empty) lines.push(app.view.empty === 1 ? translated("1 picture has no caption yet.") :
                translated`${app.view.empty} pictures have no caption yet.`);
            if (dataset.unsaved) lines.push(translated("The changed captions are saved first."));
            about.replaceChildren(make("p", {class: "lts-summary", text: lines[0]}),
                ...lines.slice(1).map((text) => make("p", {class: "lts-quiet", text: text})));
        }

        return {element, draw};
    };
})(window.loraTrainStudio = window.loraTrainStudio || {});
