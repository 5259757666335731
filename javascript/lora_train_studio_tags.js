/* The tags by frequency, the filter they make, and changes to many captions at once. */
(function(studio) {
    "use strict";
    /** kind: name on the list, and its fields as [name of the argument, placeholder]. */
    const EDITS = {
        add_start: ["Add tags in front", [["tags", "tags, with commas"]]],
        add_end: ["Add tags at the end", [["tags", "tags, with commas"]]],
        remove_tags: ["Remove tags", [["tags", "tags, with commas"]]],
        replace_tag: ["Replace a tag", [["old", "tag"], ["new", "new tag"]]],
        replace_text: ["Replace text", [["old", "text"], ["new", "new text"]]],
        replace_regex: ["Replace by pattern", [["pattern", "regular expression"], ["new", "new text"]]],
        sort_name: ["Sort by name", []],
        sort_frequency: ["Sort by frequency", []],
        deduplicate: ["Remove repeated tags", []],
        truncate: ["Shorten to tokens", [["n", "75"]]],
        set_caption: ["Write one caption for all", [["text", "caption"]]],
    };
    const PATTERNS = {
        any_of: "any of these tags, with commas", prefix: "a tag begins with", suffix: "a tag ends with",
        regex: "regular expression",
    };
    const commas = (text) => text.split(",").map((tag) => tag.trim()).filter(Boolean);

    /** What the server calls an edit. */
    function edit(kind, given) {
        switch (kind) {
        case "add_start": return {kind: "add_tags", tags: commas(given.tags), at: "start"};
        case "add_end": return {kind: "add_tags", tags: commas(given.tags), at: "end"};
        case "remove_tags": return {kind, tags: commas(given.tags)};
        case "sort_name": return {kind: "sort_tags", by: "name"};
        case "sort_frequency": return {kind: "sort_tags", by: "frequency"};
        case "truncate": return {kind: "truncate_tokens", n: Number(given.n) || 75};
        default: return {kind, ...given};
        }
    }

    studio.tags = function(app) {
        const {make, button, choice, textBox, icon, count, translated} = studio.parts, view = app.view;
        const list = make("div", {class: "lts-tags", id: "lora_train_tags"}), more = make("div", {class: "lts-quiet"});
        const fields = make("div", {class: "lts-edit-fields"});
        const target = make("span", {class: "lts-quiet"});
        let kind = "add_start", given = {}, known = "", wanted = "";
        const chooser = choice(Object.entries(EDITS).map(([name, [words]]) => [name, translated(words)]), kind, (chosen) => {
            kind = chosen;
            given = {};
            drawFields();
        }, {id: "lora_train_edit", label: "Change captions"});
        const apply = button("Apply", run, {id: "lora_train_apply"});
        const search = textBox("", (text) => {
            wanted = text.trim().toLowerCase();
            known = "";
            draw();
        }, {placeholder: "Find a tag", label: "Find a tag"});
        const asList = (name) => (name === "any_of" ? view.filter.any_of.join(", ") : view.filter[name]);
        const patterns = Object.entries(PATTERNS).map(([name, words]) => [name, textBox("", (text) =>
            app.filterBy({[name]: name === "any_of" ? commas(text) : text}, true), {
            placeholder: words, label: words, id: "lora_train_filter_" + name,
        })]);
        const element = make("div", {class: "lts-tagside"},
            make("div", {class: "lts-box"}, make("div", {class: "lts-box-head"},
                make("h4", {text: translated("Tags")}), search),
            make("p", {class: "lts-quiet lts-hint", text: translated("Press a tag: only with it; again: only without it.")}),
            list, more),
            make("details", {class: "lts-box", id: "lora_train_edit_box"},
                make("summary", {text: translated("Change many captions")}),
                target, chooser, fields, apply),
            make("details", {class: "lts-box"}, make("summary", {text: translated("More filters")}),
                ...patterns.map(([, box]) => box)));
        drawFields();

        function changedWords({changed}) {
            return translated`${count(changed, "caption")} changed; Undo takes it back.`;
        }

        function drawFields() {
            fields.replaceChildren(...EDITS[kind][1].map(([name, placeholder]) => {
                const box = textBox(given[name] || "", (text) => {
                    given[name] = text;
                }, {placeholder, id: "lora_train_edit_" + name, label: placeholder});
                box.addEventListener("keydown", (event) => {
                    if (event.key === "Enter") run();
                });
                return box;
            }));
        }

        function run() {
            const complete = EDITS[kind][1].every(([name]) => given[name] || name === "new" || name === "n");
            if (!complete) return app.say(translated("Fill in what to change."), true);
            for (const [name] of EDITS[kind][1]) given[name] = given[name] || "";
            return app.act(() => app.api.ask("edit", {edit: edit(kind, given), ...app.scope()}),
                changedWords);
        }

        /** off -> only with it -> only without it -> off */
        function press(tag) {
            const {all_of: all, none_of: none} = view.filter;
            const without = (tags) => tags.filter((other) => other !== tag);
            if (all.includes(tag)) return app.filterBy({all_of: without(all), none_of: [...none, tag]});
            if (none.includes(tag)) return app.filterBy({none_of: without(none)});
            return app.filterBy({all_of: [...all, tag]});
        }

        function chip([tag, number]) {
            const {all_of: all, none_of: none} = view.filter;
            const how = all.includes(tag) ? "with" : none.includes(tag) ? "without" : "";
            return make("span", {class: "lts-tag", "data-how": how || null},
                make("button", {
                    type: "button", class: "lts-tag-name", translate: "no", "aria-pressed": String(how !== ""), onclick: () => press(tag),
                }, (how === "without" ? "− " : "") + tag, make("small", {text: number === null ? "" : number})),
                make("button", {
                    type: "button", class: "lts-tag-remove", title: translated`Remove this tag from ${app.scopeWords()}`,
                    "aria-label": translated`Remove tag ${tag}`,
                    onclick: () => app.act(() => app.api.ask("edit", {edit: edit("remove_tags", {tags: tag}), ...app.scope()}),
                        changedWords),
                }, icon("close")));
        }

        function draw() {
            target.textContent = translated`In ${app.scopeWords()}`;
            for (const [name, box] of patterns) if (document.activeElement !== box) box.value = asList(name);
            const now = JSON.stringify([view.tags, view.filter, view.tagsTotal, app.scopeWords()]);
            if (now === known) return;
            known = now;
            const counted = new Map(view.tags);
            const used = [...view.filter.all_of, ...view.filter.none_of];
            const others = view.tags.filter(([tag]) => !used.includes(tag) && (!wanted || tag.toLowerCase().includes(wanted)));
            const chips = [...used.map((tag) => [tag, counted.has(tag) ? counted.get(tag) : null]), ...others.slice(0, 200)];
            list.replaceChildren(...chips.map(chip));
            const left = view.tagsTotal - view.tags.length + Math.max(0, others.length - 200);
            more.textContent = !chips.length ? translated("No tags yet.") : left > 0 ? "+ " + left : "";
        }

        return {element, draw};
    };
})(window.loraTrainStudio = window.loraTrainStudio || {});
