/* The pictures: rows of equal height in which every picture keeps its shape, a page at a time, and what is selected.
 *
 * A click selects one picture and shows it; Ctrl adds, Shift takes all between, the circle in the corner adds too, for
 * fingers. Arrows move, Delete removes, Space adds to the selection.
 */
(function(studio) {
    "use strict";
    const PROBLEMS = {
        broken: "Cannot be used", small: "Too small", blurry: "Blurry", duplicate: "Duplicate", no_caption: "No caption",
        unreadable_caption: "Caption cannot be read", empty_caption: "Empty caption", narrow: "Very narrow", long_caption: "Caption too long",
        deep_crop: "Crop cuts deep",
    };
    const QUIET = new Set(["no_caption", "empty_caption"]);
    const SORTS = [["name", "By name"], ["problems", "Problems first"], ["score", "Worst captions first"]];

    studio.problemWords = (codes) => codes.map((code) => studio.parts.translated(PROBLEMS[code] || code)).join(" · ");

    studio.gallery = function(app) {
        const {make, button, choice, textBox, tick, icon, count, translated} = studio.parts;
        const view = app.view;
        const grid = make("div", {
            class: "lts-grid", tabindex: "0", role: "listbox", "aria-multiselectable": "true", id: "lora_train_gallery",
            "aria-label": translated("Pictures"),
        });
        const search = textBox("", (text) => app.filterBy({text}, true), {
            placeholder: "Search captions", id: "lora_train_search", label: "Search captions",
        });
        const sort = choice(SORTS.map(([value, words]) => [value, translated(words)]), "name", (chosen) => {
            view.sort = chosen;
            app.turn(0);
        }, {id: "lora_train_sort", label: "Order"});
        const empty = tick("without caption", false, (on) => app.filterBy({empty_only: on}));
        const changed = tick("with changes", false, (on) => app.filterBy({changed_only: on}));
        const bar = make("div", {class: "lts-selection"}), pager = make("div", {class: "lts-pager"});
        const nothing = make("div", {class: "lts-nothing", hidden: true}), few = make("p", {class: "lts-quiet lts-few"});
        const element = make("div", {class: "lts-gallery"},
            make("div", {class: "lts-line lts-filter"}, make("div", {class: "lts-search"}, icon("search"), search), empty,
                changed, sort), bar, few, grid, nothing, pager);
        let known = "", anchor = "";

        // ---- drawing ----

        function tile(picture) {
            const image = make("img", {
                alt: picture.name, draggable: "false", translate: "no",
                title: picture.name + "\n" + (picture.caption || translated("No caption")),
            });
            const aspect = Math.min(2.6, Math.max(0.45, picture.width && picture.height ? picture.width / picture.height : 1));
            const loud = picture.problems.filter((code) => !QUIET.has(code));
            const made = make("div", {
                class: "lts-tile", role: "option", "data-id": picture.id,
            }, image, make("button", {
                type: "button", class: "lts-mark", tabindex: "-1", "aria-label": translated("Select"),
            }, icon("check")), make("span", {class: "lts-caption" + (picture.caption ? "" : " lts-none"),
                translate: picture.caption ? "no" : null, text: picture.caption || translated("No caption")}));
            made.style.setProperty("--aspect", aspect.toFixed(3));
            made.classList.toggle("lts-slim", aspect < 0.9);
            const badges = make("span", {class: "lts-badges"});
            if (loud.length) {
                badges.append(make("span", {class: "lts-badge lts-warn", title: studio.problemWords(loud)}, icon("warning"),
                    make("span", {text: studio.problemWords(loud.slice(0, 1))})));
            }
            if (picture.score !== null && picture.score !== undefined) {
                badges.append(make("span", {class: "lts-badge", text: Math.round(picture.score),
                    title: translated("How well the caption fits, of 100")}));
            }
            if (picture.masked) {
                badges.append(make("span", {class: "lts-badge", title: translated(studio.MASKS_USED)}, icon("mask"),
                    make("span", {text: translated("mask")})));
            }
            if (picture.held_out) {
                badges.append(make("span", {class: "lts-badge lts-held", title: translated(studio.HELD_OUT)}, icon("scale"),
                    make("span", {text: translated("held out")})));
            }
            if (picture.changed) badges.append(make("span", {class: "lts-dot", title: translated("Changed, not saved")}));
            made.append(badges);
            if (picture.problems.includes("broken")) {
                made.classList.add("lts-broken");
            } else {
                app.pictures.show(image, studio.thumbPath(picture), () => made.classList.add("lts-broken"));
            }
            return made;
        }

        function drawSelection() {
            for (const made of grid.children) {
                const chosen = view.selected.has(made.dataset.id);
                made.setAttribute("aria-selected", String(chosen));
                made.classList.toggle("lts-current", made.dataset.id === view.current);
            }
            const size = view.selected.size;
            const pictures = count(view.shown.total, "picture");
            const words = size ? translated`${size} selected` :
                app.filtered() ? translated`${pictures} of ${app.dataset().pictures}` : pictures;
            const held = app.dataset().held_out;
            const tools = [make("b", {class: "lts-count", text: words}, held.pictures && !size ? make("span", {
                class: "lts-quiet lts-out", title: translated(studio.HELD_OUT),
                text: " · " + translated`${held.pictures} held out`,
            }) : "")];
            if (size) {
                tools.push(
                    button("Caption", () => app.show("caption"), {drawn: "caption"}),
                    button("Crop", () => app.show("shape"), {drawn: "crop"}),
                    app.holdOutButton([...view.selected], view.shown.pictures.filter(({id}) => view.selected.has(id))),
                    button("Remove", () => app.remove(), {drawn: "remove", id: "lora_train_remove", title: "Delete"}),
                    button("Clear", () => app.select([]), {kind: "tool", drawn: "close", title: "Select nothing (Escape)"}));
            } else {
                if (app.filtered()) tools.push(button("Show all", () => app.unfilter(), {drawn: "close"}));
                const page = () => app.select(view.shown.pictures.map(({id}) => id));
                tools.push(button(view.shown.total > app.page ? "Select page" : "Select all", page, {
                    drawn: "check", id: "lora_train_select_all", title: "Select the pictures on this page (Ctrl+A)",
                }));
            }
            bar.replaceChildren(...tools.filter(Boolean));
            few.hidden = !held.share || app.dataset().pictures >= held.fewest;
            few.textContent = translated`With fewer than ${held.fewest} pictures, crops of them are measured on.`;
        }

        function drawPager() {
            const pages = Math.ceil(view.shown.total / app.page), page = Math.floor(view.offset / app.page) + 1;
            pager.hidden = pages < 2;
            if (pager.hidden) return;
            const list = choice(Array.from({length: pages}, (_, index) => [index + 1, String(index + 1)]), page,
                (chosen) => app.turn((chosen - 1) * app.page), {label: "Page"});
            pager.replaceChildren(
                button("Previous page", () => app.turn(view.offset - app.page), {
                    kind: "tool", drawn: "left", disabled: page === 1}),
                list, make("span", {text: "/ " + pages}),
                button("Next page", () => app.turn(view.offset + app.page), {
                    kind: "tool", drawn: "right", disabled: page === pages, id: "lora_train_next_page"}));
        }

        function drawFilter() {
            const filter = view.filter;
            if (document.activeElement !== search) search.value = filter.text;
            empty.firstChild.checked = filter.empty_only;
            changed.firstChild.checked = filter.changed_only;
            sort.selectedIndex = SORTS.findIndex(([value]) => value === view.sort);
        }

        function draw() {
            const {pictures, total} = view.shown;
            if (!app.dataset()) {
                known = "";
                grid.replaceChildren();
                return;
            }
            const now = JSON.stringify([pictures, total, view.offset]);
            if (now !== known) {
                known = now;
                grid.replaceChildren(...pictures.map(tile));
                nothing.hidden = total > 0;
                nothing.textContent = translated("No picture fits the filter.");
                drawPager();
            }
            drawFilter();
            drawSelection();
        }

        // ---- selecting ----

        app.select = (ids, current) => {
            view.selected = new Set(ids);
            view.current = current !== undefined ? current : ids.length === 1 ? ids[0] : "";
            app.draw();
        };

        function pick(id, event) {
            const ids = view.shown.pictures.map((picture) => picture.id), chosen = new Set(view.selected);
            if (event.shiftKey && ids.includes(anchor)) {
                const [from, to] = [ids.indexOf(anchor), ids.indexOf(id)].sort((a, b) => a - b);
                ids.slice(from, to + 1).forEach((between) => chosen.add(between));
            } else if (event.ctrlKey || event.metaKey || event.target.closest(".lts-mark")) {
                chosen.has(id) ? chosen.delete(id) : chosen.add(id);
                anchor = id;
            } else {
                const alone = chosen.size === 1 && chosen.has(id);
                chosen.clear();
                if (!alone) chosen.add(id);
                anchor = id;
            }
            app.select([...chosen], chosen.has(id) ? id : "");
        }

        grid.addEventListener("click", (event) => {
            const made = event.target.closest(".lts-tile");
            if (made) pick(made.dataset.id, event);
        });

        /** The picture `columns` beside the current one, or in the row above or below it. */
        function move(key, extend) {
            const tiles = [...grid.children], at = tiles.findIndex((made) => made.dataset.id === view.current);
            let next = 0;
            if (at >= 0 && (key === "ArrowLeft" || key === "ArrowRight")) {
                next = Math.min(tiles.length - 1, Math.max(0, at + (key === "ArrowLeft" ? -1 : 1)));
            } else if (at >= 0) {
                const from = tiles[at].getBoundingClientRect(), middle = from.left + from.width / 2;
                const down = key === "ArrowDown", rows = tiles.map((made) => made.getBoundingClientRect());
                const tops = rows.map((box) => box.top).filter((top) => (down ? top > from.top + 4 : top < from.top - 4));
                if (!tops.length) return;
                const row = down ? Math.min(...tops) : Math.max(...tops);
                const away = (box) => Math.abs(box.left + box.width / 2 - middle);
                next = rows.reduce((best, box, index) => (Math.abs(box.top - row) > 4 ? best :
                    best < 0 || away(box) < away(rows[best]) ? index : best), -1);
            }
            if (!tiles[next]) return;
            const id = tiles[next].dataset.id;
            app.select(extend ? [...view.selected, id] : [id], id);
            anchor = id;
            tiles[next].scrollIntoView({block: "nearest"});
        }

        /** Show the picture of that name, on the page of the gallery where it is. */
        app.find = async(name) => {
            const MOST = 500;
            await app.unfilter({});
            for (let offset = 0; offset < view.shown.total; offset += MOST) {
                const {pictures: some} = await app.api.ask("pictures", {filter: view.filter, offset, limit: MOST, sort: view.sort});
                const index = some.findIndex((picture) => picture.name === name);
                if (index < 0) continue;
                await app.turn(Math.floor((offset + index) / app.page) * app.page);
                app.select([some[index].id], some[index].id);
                const tile = [...grid.children].find((made) => made.dataset.id === some[index].id);
                if (tile) tile.scrollIntoView({block: "center"});
                return;
            }
            app.say(translated("That picture is no longer in the dataset."), true);
        };

        /** Switches between holding these pictures out and training on them, by what the `shown` of them are; null where none
         * can be held out. */
        app.holdOutButton = (ids, shown) => {
            const held = app.dataset().held_out, out = shown.length > 0 && shown.every(({held_out}) => held_out);
            if (!held.share || app.dataset().pictures < held.fewest) return null;
            return button(out ? "Train on it" : "Hold out", () => app.act(
                () => app.api.ask("hold-out", {ids, held_out: !out}),
            ), {drawn: "scale", title: out ? "Held out now: press to train on it again" : studio.HELD_OUT});
        };

        app.remove = (ids) => {
            const chosen = ids || [...view.selected];
            if (!chosen.length) return null;
            view.selected.clear();
            return app.act(() => app.api.ask("remove", {ids: chosen}),
                () => translated`${count(chosen.length, "picture")} removed; Undo brings them back.`);
        };

        return {element, draw, grid, move, toggle: () => view.current && pick(view.current, {ctrlKey: true, target: grid})};
    };

    studio.picturePath = (picture) =>
        "picture?id=" + encodeURIComponent(picture.id) + "&stamp=" + encodeURIComponent(picture.stamp);
    studio.thumbPath = (picture) =>
        "thumb?id=" + encodeURIComponent(picture.id) + "&stamp=" + encodeURIComponent(picture.stamp);

    /** The keyboard: moving in the gallery; undo, redo and save on the whole page, but in a text that has its own undo. */
    studio.keys = function(app, gallery) {
        const typing = (target) => target.closest && target.closest("input:not([type=checkbox]), textarea, select");
        gallery.grid.addEventListener("keydown", (event) => {
            const held = event.ctrlKey || event.metaKey;
            if (event.key.startsWith("Arrow") && !held) {
                gallery.move(event.key, event.shiftKey);
            } else if (event.key === "Delete") {
                app.remove();
            } else if (event.key === "Escape") {
                app.select([]);
            } else if (event.key === " ") {
                gallery.toggle();
            } else if (event.key.toLowerCase() === "a" && held) {
                app.select(app.view.shown.pictures.map(({id}) => id));
            } else {
                return;
            }
            event.preventDefault();
        });
        // The WebUI takes Escape anywhere for its Interrupt.
        app.place.addEventListener("keydown", (event) => event.key === "Escape" && event.stopPropagation());
        window.addEventListener("keydown", (event) => {
            if (!(event.ctrlKey || event.metaKey) || event.altKey || !app.inSight || !app.dataset()) return;
            const key = event.key.toLowerCase(), dataset = app.dataset();
            if (event.target !== document.body && !app.place.contains(event.target)) return;
            if (key === "s") {
                event.preventDefault();
                if (typing(event.target)) event.target.blur();
                if (dataset.unsaved || typing(event.target)) app.save();
                return;
            }
            if (typing(event.target)) return;
            if (key === "z" && !event.shiftKey && dataset.can_undo) {
                app.place.querySelector("#lora_train_undo").click();
            } else if ((key === "y" || (key === "z" && event.shiftKey)) && dataset.can_redo) {
                app.place.querySelector("#lora_train_redo").click();
            } else {
                return;
            }
            event.preventDefault();
        });
    };
})(window.loraTrainStudio = window.loraTrainStudio || {});
