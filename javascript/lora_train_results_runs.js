/* All runs on the page "3 Results", newest first, each with its picture, its scores and the disk it takes; marked ones are compared,
 * or deleted with their files. They are asked for a part at a time, as the list is scrolled.
 */
(function(results) {
    "use strict";
    const AT_ONCE = 24, MOST_AT_ONCE = 200, GAIN = "held_out_gain";

    /** "12 MB" */
    const size = (bytes) => bytes < 1e9 ? (bytes / 1e6).toFixed(bytes < 1e7 ? 1 : 0) + " MB" : (bytes / 1e9).toFixed(1) + " GB";

    results.runs = function(app, compared) {
        const {make, button, count, tick, translated} = window.loraTrainStudio.parts;
        const chosen = new Set(), list = make("div", {class: "ltr-runs", role: "list"}), bar = make("div", {class: "ltr-line"});
        const total = make("span", {class: "lts-quiet"}), more = button("Show more", () => load(), {id: "lora_train_runs_more"});
        const question = make("p", {id: "lora_train_runs_question"}), written = make("p", {class: "lts-quiet", translate: "no"});
        const loras = tick("Also the LoRAs that they wrote", false, () => ask(), "Without it no LoRA is touched.");
        const sure = button("Delete", remove, {kind: "stop", id: "lora_train_runs_sure"});
        const cancel = button("Cancel", () => close(true), {id: "lora_train_runs_keep"});
        const asking = make("div", {class: "ltr-asking", role: "alertdialog", "aria-labelledby": question.id, hidden: true,
            onkeydown: (event) => event.key === "Escape" && close(true)}, question, loras, written, make("div", {class: "lts-line"}, sure, cancel));
        const element = make("details", {class: "ltr-section", id: "lora_train_runs", ontoggle: () => element.open && renew()},
            make("summary", {text: translated("All runs")}), bar, asking, make("div", {class: "ltr-runs-scroll"}, list, more));
        let entries = [], there = 0, seen = "", busy = false, wanted = 0, asked = 0, doomed = {};

        new IntersectionObserver((seenNow) => seenNow[seenNow.length - 1].isIntersecting && element.open && load()).observe(more);

        /** The next ones, or `anew` as many as there were: those stay in sight until the answer is here. */
        async function load(anew = false) {
            if (busy || (!anew && entries.length && entries.length >= there)) return;
            busy = true;
            const mine = wanted, from = anew ? 0 : entries.length, many = anew ? Math.min(MOST_AT_ONCE, Math.max(AT_ONCE, entries.length)) : AT_ONCE;
            try {
                const found = await app.page.api.ask(`history?offset=${from}&count=${many}`);
                if (mine !== wanted) return;
                there = found.total;
                if (anew) entries = [];
                const fresh = found.runs.filter((run) => entries.every((other) => other.id !== run.id));
                entries.push(...fresh);
                const held = list.contains(document.activeElement) && document.activeElement.closest("[data-run]");
                list[anew ? "replaceChildren" : "append"](...fresh.map(entry));
                const again = anew && held && list.querySelector(`[data-run="${CSS.escape(held.dataset.run)}"] .ltr-run-mark`);
                if (again) again.focus({preventScroll: true});
                more.hidden = !found.runs.length || entries.length >= there;
                drawBar();
            } catch (error) {
                more.hidden = true;
                app.say(error.message, true);
            } finally {
                busy = false;
                if (mine !== wanted) load(true);
            }
        }

        /** From the first one again. */
        function renew() {
            wanted += 1;
            load(true);
            app.page.api.ask("history/disk").then((disk) => {
                total.textContent = `${count(disk.runs, "run")} · ` + translated`${size(disk.size)} of records and pictures, ${size(disk.lora_size)} of LoRAs`;
            }).catch(() => { total.textContent = ""; });
        }

        function drawBar() {
            const marked = [...chosen], focused = bar.contains(document.activeElement) && document.activeElement.id;
            bar.replaceChildren(total, ...marked.length ? [
                button(translated`Compare ${marked.length}`, () => compared.show({runs: marked.reverse()}), {
                    drawn: "scale", id: "lora_train_runs_compare", disabled: marked.length < 2,
                    title: marked.length < 2 ? "Mark another one to compare with" : "What differs, what each is worth, their curves and pictures"}),
                button(translated`Delete ${marked.length}`, open, {drawn: "remove", id: "lora_train_runs_delete"}),
            ] : [make("span", {class: "lts-quiet", text: translated("Mark some to compare or delete them")})]);
            if (focused && bar.querySelector("#" + focused)) bar.querySelector("#" + focused).focus();
        }

        function open() {
            loras.querySelector("input").checked = false;
            return ask().then(() => asking.hidden || cancel.focus());
        }

        /** With `back` the keyboard goes back to where the question came from. */
        function close(back) {
            asked += 1;
            asking.hidden = true;
            const from = bar.querySelector("#lora_train_runs_delete") || element.querySelector("summary");
            if (back) from.focus();
        }

        /** What deleting takes away is told before, and asked; until it is told nothing can be deleted. */
        async function ask() {
            const mine = ++asked, wish = {runs: [...chosen], loras: loras.querySelector("input").checked};
            sure.disabled = true;
            const found = await app.act(() => app.page.api.ask("history/deletion", wish));
            if (mine !== asked) return;
            if (!found) return close(true);
            const names = found.loras.slice(0, 5).join(", ") + (found.loras.length > 5 ? " …" : "");
            question.textContent = translated`Delete ${count(found.runs.length, "run")} with settings, curves and pictures? ${size(found.freed)} are freed.`;
            written.textContent = wish.loras ? names || "–" : "";
            written.hidden = !wish.loras;
            doomed = wish;
            sure.disabled = asking.hidden = false;
        }

        function remove() {
            sure.disabled = true;
            return app.act(() => app.page.api.ask("history/delete", doomed), (found) => {
                chosen.clear();
                compared.element.hidden = true;
                drawBar();
                close(true);
                app.runs = null;
                app.say(translated`Deleted ${count(found.runs.length, "run")}: ${size(found.freed)} are free again.`);
                app.renew();
                renew();
            }).then(() => {
                sure.disabled = false;
                if (!asking.hidden) cancel.focus();
            });
        }

        function entry(run) {
            const name = run.name || run.id, image = make("img", {alt: ""});
            if (run.file) app.page.pictures.showInSight(image, `results/file?run=${encodeURIComponent(run.id)}&name=${encodeURIComponent(run.file)}&small=1`);
            const scores = Object.entries(run.scores).filter(([key, value]) => value !== null && ["likeness", "prompt_following", GAIN].includes(key))
                .map(([key, value]) => `${results.measureLabel(key)} ${results.measureText(key, value)}`);
            const date = run.started ? new Date(run.started * 1000).toLocaleString(window.loraTrainLanguage.tag, {dateStyle: "medium", timeStyle: "short"}) : "";
            return make("div", {class: "ltr-run", role: "listitem", "data-run": run.id},
                make("input", {type: "checkbox", class: "ltr-run-mark", "aria-label": translated`Mark ${name}`, checked: chosen.has(run.id), onchange: (event) => {
                    chosen[event.target.checked ? "add" : "delete"](run.id);
                    close(false);
                    drawBar();
                }}), make("span", {class: "ltr-face"}, run.file ? image : null),
                make("div", {class: "ltr-run-words"}, make("b", {translate: "no", text: name}),
                    make("small", {text: [date, results.findingWords(run), run.total ? `${run.steps} / ${run.total}` : ""].filter(Boolean).join(" · ")}),
                    make("small", {text: scores.join(" · ")})),
                make("span", {class: "ltr-size", text: size(run.size + run.lora_size), title: translated`${size(run.size)} of records and pictures, ${size(run.lora_size)} of LoRAs`}),
                make("div", {class: "ltr-run-tools"},
                    run.sweep && button(translated`Sweep ${run.sweep.name}`, () => compared.show({sweep: run.sweep.id}), {title: "Compare the runs of this sweep"}),
                    button("Show", () => app.choose(run.id).then(() => app.place.scrollIntoView()), {title: "Show its results above"}),
                    run.usable && button("Use these settings", () => results.useSettings(app, run.id), {title: "Put them into the fields of the page 2 Train; the name stays."})));
        }

        function draw() {
            const now = JSON.stringify((app.runs || []).map((run) => [run.id, run.outcome]));
            element.hidden = !(app.runs && app.runs.length);
            if (now === seen || !app.runs) return;
            seen = now;
            if (element.open) renew();
        }

        drawBar();
        return {element, draw};
    };
})(window.loraTrainResults = window.loraTrainResults || {});
