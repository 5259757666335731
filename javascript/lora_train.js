/* The tab "Train LoRA" while a run goes on: it asks the API for the status and has it drawn, the run's progress by
 * lora_train_progress.js, how it learns by lora_train_learning.js, the offer to resume a run by lora_train_resume.js, what may
 * be done with its LoRA by lora_train_result.js; the runs that wait by lora_train_queue.js.
 *
 * The page's fields (lora_train_fields.js) and its Train button are gradio's; everything about a running job is asked for and
 * drawn here, so a reloaded page shows it again. One poll at a time: every second while a job runs and the tab is in sight,
 * every ten when idle, none in the background unless a notice is wanted. All text is set as textContent.
 */
(function() {
    "use strict";
    if (window.loraTrain) return;
    window.loraTrain = {};

    const RUNNING_MS = 1000, IDLE_MS = 10000, RETRY_MS = 3000, KICKS = 20, KICK_MS = 300;
    const API = "./lora-train/v1/";

    const state = {
        token: "", run: "", every: 1, points: [], last: null, inSight: false, timer: 0, polling: false,
        kicks: 0, watchers: [], model: null,
    };
    const view = {};
    /** What the parts of the tab share, "3 Results" among them; completed by `build`. */
    const page = {};

    const app = () => (typeof gradioApp === "function" ? gradioApp() : document);
    const byId = (id) => app().querySelector("#" + id);
    /** gradio 3 gives a button's id to the button itself. */
    const button = (id) => {
        const found = byId(id);
        return found && found.tagName !== "BUTTON" ? found.querySelector("button") : found;
    };
    const translated = (...given) => window.loraTrainLanguage.translated(...given);

    // ---- start -------------------------------------------------------------------------------------------------

    /** What layout.py left for the script, null where it is not there. */
    function pageData() {
        const components = (window.gradio_config && window.gradio_config.components) || [];
        const left = (id) => components.find((c) => c.props && c.props.elem_id === id).props.value;
        try {
            return {token: left("lora_train_token"), ...JSON.parse(left("lora_train_page"))};
        } catch (error) {
            return null;
        }
    }

    /** Fill the place that layout.py leaves, once. False while it is not there yet. */
    function attach() {
        const live = byId("lora_train_live");
        if (!live) return false;
        if (live.dataset.attached) return true;
        const data = pageData();
        if (!data) return false;
        live.dataset.attached = "yes";
        state.token = data.token;
        window.loraTrainLanguage.watch(byId("lora_train"));
        Object.assign(page, window.loraTrainFields(byId, button));
        Object.assign(window.loraTrain, {setText: page.setText, planSoon: page.planSoon, chosen: page.chosen});
        build(live, byId("lora_train_drawn"));
        showTooltips(data.tooltips);
        for (const [id, word] of Object.entries(data.placeholders)) {
            const box = byId(id) && byId(id).querySelector("input");
            if (!box) continue;
            box.placeholder = translated(word);
            // gradio begins with 0 where it is told nothing.
            if (box.value === "0") page.setText(box, "");
        }
        listen();
        page.restored = page.restoreDraft();
        return true;
    }

    function build(live, drawn) {
        const studio = window.loraTrainStudio;
        page.api = studio.makeApi(state.token, {root: API, keep: true});
        page.pictures = studio.makePictures(page.api);
        page.zoom = window.loraTrainZoom(page.pictures, translated);
        page.sender = window.loraTrainSend(page);
        Object.assign(view, window.loraTrainProgress(live, drawn, translated));
        view.result = window.loraTrainResult(page, page.sender, (run) => page.showResults(run));
        view.offer = window.loraTrainResume(view.resume, ask, () => { kick(); poll(); }, view.showProblem, translated);
        view.drawLearning = window.loraTrainLearning(page, view);
        page.fill = window.loraTrainFiles(page, byId("lora_train_files"), page.settings);
        view.queue = window.loraTrainQueue(page, byId("lora_train_queue"), page.fill);
        state.watchers.push(view.queue);
        window.loraTrainSuggestions(page, byId("lora_train_suggestions"), page.fill, page.settings);
    }

    function showTooltips(tooltips) {
        for (const id of Object.keys(tooltips)) {
            const target = byId(id);
            if (!target) continue;
            const text = translated(tooltips[id]);
            target.title = target.title || text;
            const input = target.querySelector("input, textarea");
            if (input && !input.title) input.title = text;
        }
    }

    function listen() {
        const root = byId("lora_train");
        new IntersectionObserver((entries) => {
            state.inSight = entries[entries.length - 1].isIntersecting;
            if (state.inSight) poll();
        }).observe(root);
        document.addEventListener("visibilitychange", () => {
            if (document.hidden) {
                page.keepDraft();
            } else {
                poll();
            }
        });
        window.addEventListener("pagehide", page.keepDraft);
        // The WebUI's: its settings changed, of which the checkpoint is one.
        if (typeof onOptionsChanged === "function") onOptionsChanged(poll);
        root.addEventListener("change", page.planSoon);
        for (const id of ["lora_train_start", "lora_train_find_rate"]) button(id).addEventListener("click", kick);
        root.addEventListener("click", (event) => {
            const pressed = event.target.closest && event.target.closest("button");
            if (pressed && pressed.id === "lora_train_overwrite_it") kick();
        });
        button("lora_train_sample").addEventListener("click", () => askNow("results/sample"));
        button("lora_train_save_now").addEventListener("click", () => askNow("save"));
        button("lora_train_pause").addEventListener("click", () => askNow("pause", {paused: !isPaused(state.last)}));
        button("lora_train_stop_save").addEventListener("click", () => stop(true));
        button("lora_train_stop").addEventListener("click", () => stop(false));
        button("lora_train_report").addEventListener("click", downloadReport);
        // Before the WebUI's own handler of Ctrl+Enter, which looks for a Generate button that is not on this tab.
        window.addEventListener("keydown", (event) => {
            if (event.key !== "Enter" || !(event.ctrlKey || event.metaKey) || !state.inSight) return;
            event.preventDefault();
            event.stopImmediatePropagation();
            const start = button("lora_train_start");
            // Out of sight on the page "1 Dataset".
            if (!start.disabled && start.offsetParent) start.click();
        }, true);
    }

    // ---- asking ------------------------------------------------------------------------------------------------

    async function ask(path, body) {
        const options = {headers: {"X-Lora-Train": state.token}, cache: "no-store"};
        if (body) {
            options.method = "POST";
            options.headers["Content-Type"] = "application/json";
            options.body = JSON.stringify(body);
        }
        const response = await fetch(API + path, options);
        const data = await response.json().catch(() => ({}));
        if (!response.ok) throw new Error(data.error || translated`The server answered ${response.status}.`);
        return data;
    }

    function watching() {
        return state.inSight && !document.hidden;
    }

    function schedule(milliseconds) {
        clearTimeout(state.timer);
        if (watching() || view.queue.waits()) state.timer = setTimeout(poll, watching() ? milliseconds : IDLE_MS);
    }

    async function poll() {
        if (state.polling) return;
        state.polling = true;
        clearTimeout(state.timer);
        let wait = RETRY_MS;
        try {
            wait = await update();
        } catch (error) {
            // fetch itself fails with a TypeError: nobody answers. Otherwise the server said why.
            view.showProblem(error instanceof TypeError ? translated("The server does not answer; trying again.") : error.message);
        } finally {
            state.polling = false;
            schedule(wait);
        }
    }

    /** One question, drawn; returns the milliseconds until the next. */
    async function update() {
        const after = state.points.length ? state.points[state.points.length - 1][0] : 0;
        let answer = await ask("status?after=" + after);
        const other = answer.run !== state.run || answer.every !== state.every;
        if (other) {
            if (after > 0) answer = await ask("status?after=0");
            state.points = [];
        }
        const fresh = answer.run !== state.run;
        state.run = answer.run;
        state.every = answer.every;
        state.model = answer.model;
        state.points = state.points.concat(answer.points);
        view.result.draw(answer);
        noticeResult(answer, fresh);
        // The summary's time is corrected once by the steps that were made.
        const measured = (status) => Boolean(status && status.step && status.step.seconds_left !== null);
        if (state.last && (modelTitle(state.last) !== modelTitle(answer) || (measured(answer) && !measured(state.last)))) page.planSoon();
        page.checkPlan();
        state.last = answer;
        draw(answer);
        view.offer(answer);
        state.watchers.forEach((watch) => watch(answer));
        page.keepDraft();
        if (answer.running) {
            state.kicks = 0;
            return RUNNING_MS;
        }
        if (state.kicks > 0) {
            state.kicks -= 1;
            return KICK_MS;
        }
        return IDLE_MS;
    }

    function modelTitle(answer) {
        return answer.model ? answer.model.title + answer.model.text : "";
    }

    /** After a press of Train: look often until the job shows. */
    function kick() {
        page.planAfterPress();
        state.kicks = KICKS;
        state.polling || schedule(KICK_MS);
    }

    async function stop(save) {
        const step = state.last && state.last.step;
        if (!save && step && !window.confirm(translated("Stop without saving what was learnt?"))) return;
        try {
            await ask("stop", {save: save});
        } catch (error) {
            view.showProblem(error.message);
        }
        poll();
    }

    const isPaused = (answer) => Boolean(answer && answer.running && answer.stage && answer.stage.name === "Paused");

    async function askNow(path, body) {
        try {
            await ask(path, body || {});
        } catch (error) {
            view.showProblem(error.message);
        }
        poll();
    }

    // ---- drawing -----------------------------------------------------------------------------------------------

    function draw(answer) {
        const model = byId("lora_train_model");
        if (model) model.textContent = translated(answer.model ? answer.model.text : "No model is loaded");
        for (const id of ["lora_train_start", "lora_train_find_rate"]) setDisabled(id, answer.running);
        setDisabled("lora_train_overwrite_it", answer.running);
        ["lora_train_sample", "lora_train_save_now", "lora_train_pause"].forEach(
            (id) => setDisabled(id, !answer.running || answer.stopping !== ""));
        button("lora_train_pause").textContent = translated(isPaused(answer) ? "Go on" : "Pause");
        setDisabled("lora_train_stop", !answer.running || answer.stopping === "stop");
        setDisabled("lora_train_stop_save", !answer.running || answer.stopping !== "");
        const any = answer.run !== "";
        view.head.hidden = !any;
        view.name.textContent = answer.name;
        view.draw(answer);
        view.drawLearning(answer, state.points);
        setTitleText(answer);
    }

    function setDisabled(id, disabled) {
        const found = button(id);
        if (found) found.disabled = disabled;
    }

    function setTitleText(answer) {
        const text = answer.running ? Math.floor(100 * answer.fraction) + "%" : "";
        if (typeof setTitle === "function") {
            // The WebUI's own, which also asks its settings. Left alone while somebody else may be using it.
            if (answer.running || view.titled) setTitle(text);
        } else {
            document.title = (text ? "[" + text + "] " : "") + "Train LoRA";
        }
        view.titled = answer.running;
    }

    // ---- the result --------------------------------------------------------------------------------------------

    /** When a file was written while we looked: let the WebUI's LoRA cards show it. */
    function noticeResult(answer, fresh) {
        const before = fresh || !state.last ? 0 : state.last.saved.length;
        const seenRunning = fresh ? answer.running : state.last && state.last.running;
        if (answer.saved.length > before && seenRunning) page.sender.refreshCards();
    }

    /** A zip about the last run; asked for here and not by a link, which could not show the token. */
    async function downloadReport() {
        try {
            const response = await fetch(API + "report", {headers: {"X-Lora-Train": state.token}, cache: "no-store"});
            if (!response.ok) throw new Error((await response.json()).error);
            window.loraTrainStudio.parts.offer(await response.blob(), "lora-train-report.zip");
        } catch (error) {
            view.showProblem(error instanceof TypeError ? translated("The server does not answer.") : error.message);
        }
    }

    // ---- when ----------------------------------------------------------------------------------------------------

    /** Call `begin` once the page and its language are there; it answers false where it is not yet. The WebUI says
     * when; elsewhere the page is watched until `begin` is content. */
    function whenThere(begin) {
        if (typeof onUiLoaded === "function") {
            onUiLoaded(() => window.loraTrainLanguage.ready.then(begin));
            return;
        }
        const watch = async() => {
            await window.loraTrainLanguage.ready;
            if (begin()) return;
            const observer = new MutationObserver(() => begin() && observer.disconnect());
            observer.observe(document.documentElement, {childList: true, subtree: true});
        };
        if (document.readyState === "loading") {
            document.addEventListener("DOMContentLoaded", watch);
        } else {
            watch();
        }
    }

    Object.assign(page, {
        byId, button, translated, ask, kick,
        modelLoaded: () => Boolean(state.model),
        status: () => state.last,
        /** Have `watch` see each status. */
        watch: (watch) => state.watchers.push(watch),
        turnTo: (number) => window.loraTrainStudio.turnTo(number),
    });
    Object.assign(window.loraTrain, {attach, page, pageData, whenThere});
    whenThere(attach);
})();
