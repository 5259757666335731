/* The notice that a run or the queue has ended: the browser's own notification, also while another tab is in front, and a webhook
 * that the server sends to. Leave for notifications is asked for when the box is ticked, and never otherwise.
 */
(function() {
    "use strict";
    const KEY = "lora_train_notify";
    const open = (entry) => ["waiting", "running"].includes(entry.state);

    /** `words` are those of a run's state. Returns the box's element, what to call with each status and each list of the queue,
     * and whether somebody waits for the end of what goes on. */
    window.loraTrainNotice = function(page, words) {
        const {make, translated} = window.loraTrainStudio.parts;
        let last = null, queue = [], on = remembered() && permission() === "granted";
        const said = make("span", {class: "lora-train-notice-said", role: "status"});
        const box = make("input", {type: "checkbox", id: "lora_train_notify", checked: on, onchange: turn});
        const webhook = make("button", {type: "button", class: "lora-train-files-button", id: "lora_train_webhook",
            text: translated("Webhook"), title: translated("Have the server send a message to a chat when a run has ended."),
            onclick: chooseWebhook});
        const element = make("span", {class: "lora-train-notice"}, make("label", {title: translated(
            "Show a notification of the browser when a run or the queue has ended, while this page is open.")}, box,
        make("span", {text: translated("Notify me")})), webhook, said);

        function permission() {
            return window.isSecureContext && typeof Notification === "function" ? Notification.permission : "missing";
        }

        function remembered() {
            try {
                return localStorage.getItem(KEY) === "yes";
            } catch (error) {
                return false;
            }
        }

        function refuse(text) {
            on = box.checked = false;
            said.textContent = text;
        }

        async function turn() {
            on = box.checked;
            said.textContent = "";
            if (on && permission() === "missing") {
                refuse(translated("This browser shows notifications only of pages at localhost or with https."));
            } else if (on && permission() !== "granted" && await Notification.requestPermission() !== "granted") {
                refuse(translated("The browser does not allow notifications of this page; its settings do."));
            }
            try {
                localStorage.setItem(KEY, on ? "yes" : "no");
            } catch (error) { /* a browser that keeps nothing */ }
        }

        function show(title, body, tag) {
            if (!on) return;
            try {
                const shown = new Notification(title, {body, tag});
                shown.onclick = () => { window.focus(); shown.close(); };
            } catch (error) {  // some browsers of phones leave it to service workers
                refuse(translated("This browser shows no notifications of pages."));
            }
        }

        /** The run that was under way at the last look, and is not any more. */
        async function status(answer) {
            const before = last;
            last = {run: answer.run, running: answer.running};
            if (!on || !before || !before.running || (answer.running && answer.run === before.run)) return;
            try {
                const run = (await page.ask("runs")).runs.find((one) => one.id === before.run);
                if (run) show(run.name + ": " + words(run.outcome), translated(run.message), "lora-train-" + run.id);
            } catch (error) { /* the next look shows it on the page */ }
        }

        function entries(told) {
            const over = (entry) => open(entry) && told.some((now) => now.id === entry.id);  // not taken out of the list
            const ended = queue.some(over) && !told.some(open);
            queue = told;
            if (!ended) return;
            const done = told.filter((entry) => entry.state === "done").length;
            show(translated("The queue has ended"), translated`${done} done, ${told.length - done} not`, "lora-train-queue");
        }

        async function chooseWebhook() {
            try {
                const {webhook: known, problem} = await page.ask("queue/webhook");
                const now = known ? translated`Now: ${known}` + (problem ? "\n" + translated`The last message did not arrive: ${problem}` : "") : "";
                const url = window.prompt(translated("Address that is sent a message when a run has ended (Discord, Slack, or a " +
                    "program of your own); empty for none.") + (now && "\n" + now), "");
                if (url === null || (known && !url.trim() && !window.confirm(translated`Send no more messages to ${known}?`))) return;
                const kept = await page.ask("queue/webhook", {url});
                said.textContent = kept.webhook ? translated("A first message was sent.") : translated("No message is sent.");
            } catch (error) {
                said.textContent = translated(error.message);
            }
        }

        return {element, status, entries, waits: () => on && Boolean((last && last.running) || queue.some(open))};
    };
})();
