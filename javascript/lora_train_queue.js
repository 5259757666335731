/* The queue on the page "2 Train": the fields' settings are put into it, now or for later; what waits can be ordered, changed and
 * taken out; what failed or was interrupted waits again at a press. All text is set as textContent.
 */
(function() {
    "use strict";
    const LOOK_MS = 10000, STEP_MS = 50, SWEEP_MS = 300000;
    const stateWords = (state, translated) => ({
        waiting: translated("waits"), running: translated("is being trained"), done: translated("done"),
        stopped: translated("stopped"), failed: translated("failed"), interrupted: translated("interrupted"),
    }[state] || state);

    /** `fill` puts settings into the fields. Returns a function to be called with each status; `waits` says whether somebody is
     * to be told when what goes on has ended. */
    window.loraTrainQueue = function(page, place, fill) {
        const {make, once, translated} = window.loraTrainStudio.parts;
        const button = (text, title, press, id) => make("button", {class: "lora-train-files-button", id, text: translated(text),
            title: translated(title), onclick: press});
        let known = "", looked = 0, drawn = "", told = {held: false, entries: []}, editing = "";
        const after = make("input", {type: "time", class: "lts-input", title: translated(
            "The run begins at this time of day or later; empty for at once.")});
        const idle = make("input", {type: "number", min: 0, max: 1440, class: "lts-input lora-train-queue-idle", title: translated(
            "The run begins once nobody has generated for so many minutes; empty for at once.")});
        const list = make("ol", {class: "lora-train-queue-list"}), problem = make("div", {role: "alert", hidden: true,
            class: "lora-train-problem"});
        const bar = make("div", {class: "lora-train-queue-bar"});
        const notice = window.loraTrainNotice(page, (state) => stateWords(state, translated));
        const sweep = window.loraTrainSweep(page, (request) => guarded(() => enqueue({...when(), ...request}, SWEEP_MS)));
        place.append(bar, sweep, problem, list, notice.element);

        async function guarded(press) {
            try {
                await press();
                problem.hidden = true;
            } catch (error) {
                problem.textContent = translated(error.message);
                problem.hidden = false;
            }
            await look();
            page.kick();  // the next run may begin at any moment
        }

        const act = (path, body) => () => guarded(() => page.ask("queue/" + path, body));

        async function look() {
            looked = Date.now();
            try {
                told = await page.ask("queue");
            } catch (error) {
                known = "";  // asked again with the next status
                return;
            }
            notice.entries(told.entries);
            draw();
        }

        /** By a hidden button, whose handler sees the fields as they stand; it answers with the sign. A refusal is shown as that of
         * Train. */
        async function enqueue(request, patience = LOOK_MS) {
            const box = (id) => page.byId(id).querySelector("textarea, input"), sign = String(Math.random());
            page.setText(box("lora_train_queued"), JSON.stringify({...request, sign}));
            page.button("lora_train_enqueue").click();
            for (let waited = 0; box("lora_train_enqueued").value !== sign && waited < patience; waited += STEP_MS) {
                await new Promise((go) => setTimeout(go, STEP_MS));
            }
            if (box("lora_train_enqueued").value !== sign) throw new Error(translated("The server does not answer."));
        }

        const when = () => ({start_after: after.value, idle_minutes: Number(idle.value || 0)});

        /** The button is disabled until the answer is here: a double click asks once. */
        const add = once(async({currentTarget: pressed}) => {
            pressed.disabled = true;
            await guarded(() => enqueue(when()));
            pressed.disabled = false;
            const again = bar.querySelector("#" + pressed.id);
            if (again && document.activeElement === document.body) again.focus();
        });

        const keep = () => guarded(() => enqueue({id: editing}).then(() => {
            if (!page.byId("lora_train_answer").textContent.trim()) editing = "";
        }));

        const edit = (entry) => () => guarded(async() => {
            fill({values: (await page.ask("queue/settings?id=" + entry.id)).settings});
            editing = entry.id;
        });

        /** Where the keyboard is in the bar or the list. Returns what puts it there again once they are drawn anew: on the same
         * field or button, else on that of the row in its place, else on the first button. */
        function keyboard() {
            const at = document.activeElement, row = at && at.closest("li");
            if (!bar.contains(at) && !list.contains(at)) return () => {};
            const index = [...list.children].indexOf(row), first = (within) => within && within.querySelector("button:not(:disabled)");
            const same = (within) => within && [...within.querySelectorAll("button")].find((one) => one.textContent === at.textContent);
            return () => {
                const stayed = row && list.querySelector(`[data-entry="${CSS.escape(row.dataset.entry)}"]`);
                const next = row && list.children[Math.min(index, list.children.length - 1)];
                const to = at.isConnected ? at : row ? same(stayed) || first(stayed) || same(next) : same(bar);
                (to || first(bar) || at).focus();
            };
        }

        /** Anew only where something changed: a field that is being typed into would lose the focus. */
        function draw() {
            const now = JSON.stringify([told, editing]);
            if (now === drawn) return;
            drawn = now;
            const refocus = keyboard();
            const edited = told.entries.find((entry) => entry.id === editing && entry.state === "waiting");
            if (!edited) editing = "";
            const ended = told.entries.filter((entry) => !["waiting", "running"].includes(entry.state));
            bar.replaceChildren(...(edited ? [
                button("Keep the changes", "Give the run in the queue the settings of the fields.", keep),
                make("span", {translate: "no", text: edited.name}),
                button("Cancel", "Leave the run in the queue as it is.", () => { editing = ""; draw(); }),
            ] : [
                button("Add to queue", "Train with these settings once the runs before it have ended, on the checkpoint that is " +
                    "loaded now.", add, "lora_train_queue_add"),
                make("label", {}, make("span", {text: translated("after")}), after),
                make("label", {}, make("span", {text: translated("minutes without generations")}), idle),
                told.entries.length && button(told.held ? "Go on with the queue" : "Hold the queue",
                    "While it is held, no other run begins.", act("hold", {held: !told.held})),
                ended.length && button("Clear ended", "Take out of the list what has ended; files stay.", () => guarded(async() => {
                    for (const entry of ended) await page.ask("queue/remove", {id: entry.id});
                })),
            ].filter(Boolean)));
            const waiting = told.entries.filter((entry) => entry.state === "waiting");
            list.replaceChildren(...told.entries.map((entry) => row(entry, waiting)));
            refocus();
        }

        function row(entry, waiting) {
            const place = waiting.indexOf(entry), ended = !["waiting", "running"].includes(entry.state);
            const move = (to) => act("move", {id: entry.id, position: to}), again = (resume) => act("retry", {id: entry.id, resume});
            const later = entry.not_before * 1000 > Date.now() ? " · " + new Date(entry.not_before * 1000).toLocaleString(window.loraTrainLanguage.tag) : "";
            return make("li", {class: "lora-train-queue-" + entry.state, "data-entry": entry.id},
                make("b", {translate: "no", text: entry.name}),
                make("span", {text: stateWords(entry.state, translated)}), place >= 0 && later,
                make("span", {class: "lora-train-queue-buttons"},
                    place > 0 && button("↑", "Earlier", move(place - 1)),
                    place >= 0 && place < waiting.length - 1 && button("↓", "Later", move(place + 1)),
                    place >= 0 && button("Edit", "Put its settings into the fields, to change them.", edit(entry)),
                    entry.resumable && button("Resume", "Go on where that run left off.", again(true)),
                    ended && entry.state !== "done" && button("Start anew", "Have it wait again, from its beginning.", again(false)),
                    entry.state !== "running" && button("×", "Take it out of the queue; files stay.", act("remove", {id: entry.id}))),
                entry.message && make("div", {class: "lora-train-note", text: translated(entry.message)}));
        }

        draw();
        const watch = (answer) => {
            notice.status(answer);
            const now = answer.run + answer.running;
            const open = told.entries.some((entry) => ["waiting", "running"].includes(entry.state));
            if (now === known && !(open && Date.now() - looked > LOOK_MS)) return;
            known = now;
            look();
        };
        return Object.assign(watch, {waits: notice.waits});
    };
})();
