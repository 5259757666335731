/* The page "3 Results": which run is shown, when the server is asked, and how the parts of the page hear of a change.
 *
 * Each part (head, recommendation, saves, grid, pictures, list of runs) is made once with `app` and draws itself anew on app.draw(). While the
 * server paints it is asked every second, otherwise every ten; never out of sight. What a run under way adds is told by the
 * status that lora_train.js asks for.
 */
(function(results) {
    "use strict";
    const WORKING_MS = 1000, IDLE_MS = 10000, RENEW_MS = 3000, RUN_KEY = "lora_train_results_run", PAGE = 2;

    function remembered() {
        try {
            return localStorage.getItem(RUN_KEY) || "";
        } catch (error) {
            return "";
        }
    }

    function remember(run) {
        try {
            localStorage.setItem(RUN_KEY, run);
        } catch (error) { /* a browser that keeps nothing */ }
    }

    function makeApp(page, place) {
        const app = {page, place, inSight: false, runs: null, run: remembered(), found: null, task: null, said: {text: ""}};
        const state = {timer: 0, parts: [], seen: "", renewed: 0, wanted: 0, polling: false, failed: false};

        app.address = (file, small) => `results/file?run=${encodeURIComponent(app.found.run)}&name=${encodeURIComponent(file)}` +
            (small ? "&small=1" : "");
        app.working = () => Boolean(app.task && app.task.running);
        app.draw = () => state.parts.forEach((part) => part.draw());
        app.build = (parts) => {
            state.parts = parts;
        };
        /** `more` is what can be done next: [words, press]. */
        app.say = (text, problem, more) => {
            app.said = {text, problem: Boolean(problem), more};
            app.draw();
        };

        const watching = () => app.inSight && !document.hidden;

        function schedule() {
            clearTimeout(state.timer);
            if (watching()) state.timer = setTimeout(look, app.working() ? WORKING_MS : IDLE_MS);
        }

        /** The work under way; what it made is asked for anew every few seconds and at its end. */
        async function look() {
            if (state.polling) return;
            state.polling = true;
            try {
                const before = app.task, {task} = await page.api.ask("results/task");
                if (state.failed) app.say("");
                state.failed = false;
                app.task = task;
                const moved = task && (!before || before.id !== task.id || before.done !== task.done);
                const ended = task && !task.running && (!before || before.running || before.id !== task.id);
                if (ended || (moved && Date.now() - state.renewed > RENEW_MS)) await app.renew();
                if (ended && before && before.running) app.say(task.message, task.outcome === "failed");
                app.draw();
            } catch (error) {
                state.failed = true;
                app.say(error.message, true);
            } finally {
                state.polling = false;
                schedule();
            }
        }

        /** Everything of the run that is shown; the newest one where none was chosen, or the chosen one is gone. */
        app.renew = async() => {
            const mine = ++state.wanted, resultsOf = (run) => page.api.ask("results?run=" + encodeURIComponent(run));
            state.renewed = Date.now();
            try {
                let [runs, found] = await Promise.all([
                    app.runs || page.api.ask("runs").then((answer) => answer.runs),
                    app.run ? resultsOf(app.run).catch(() => null) : null]);
                if (!found && runs.length) found = await resultsOf(runs[0].id);
                if (mine !== state.wanted) return;
                if (found && !runs.some((run) => run.id === found.run)) runs = (await page.api.ask("runs")).runs;
                Object.assign(app, {runs, found, task: found ? found.task : app.task});
            } catch (error) {
                app.say(error.message, true);
            }
            app.draw();
            schedule();
        };

        /** Show a run, "" for the newest. */
        app.choose = (run) => {
            if (run !== app.run) app.said = {text: ""};
            app.run = run;
            remember(run);
            return app.renew();
        };

        /** Do what a press asked for; what the server refuses is said. Then look again, and call `said` with the answer. */
        app.act = async(what, said) => {
            app.say("");
            try {
                const answer = await what();
                await app.renew();
                if (said) said(answer);
                return answer;
            } catch (error) {
                app.say(error.message, true);
                return null;
            }
        };

        /** Start work on the server. */
        app.start = (path, body) => app.act(() => page.api.ask(path, body)).then((answer) => {
            schedule();
            return answer;
        });

        page.watch((status) => {
            const now = JSON.stringify([status.run, status.running, status.evaluated, status.saved.length]);
            if (now === state.seen) return;
            const [run, running] = state.seen ? JSON.parse(state.seen) : [status.run, status.running];
            state.seen = now;
            // What was chosen before a new run began is no longer what is wanted.
            if (run !== status.run && status.running) app.run = "";
            if (run !== status.run || running !== status.running) app.runs = null;
            if (watching()) app.renew();
        });
        return app;
    }

    function build(app) {
        const {make, button} = window.loraTrainStudio.parts;
        const head = results.head(app), recommended = results.recommended(app), saves = results.saves(app);
        const share = results.share(app), learnt = results.learnt(app), grid = results.grid(app), pictures = results.pictures(app);
        const compared = results.comparison(app), runs = results.runs(app, compared);
        const notice = make("div", {class: "ltr-notice", role: "status", hidden: true});
        app.place.replaceChildren(head.element, notice, head.progress, head.empty, recommended.element, share.element, learnt.element,
            saves.element, grid.element, pictures.element, runs.element, compared.element);
        let said = null;

        function drawNotice(now) {
            if (now === said) return;
            said = now;
            notice.hidden = !now.text;
            notice.replaceChildren(make("span", {text: window.loraTrainStudio.parts.translated(now.text)}), ...(now.more ? [button(...now.more)] : []));
            notice.classList.toggle("ltr-wrong", Boolean(now.problem));
        }

        const all = {draw: () => {
            drawNotice(app.said);
            app.place.classList.toggle("lts-loading", !app.runs && !app.found);
        }};
        app.build([all, head, recommended, share, learnt, saves, grid, pictures, runs]);
    }

    function attach() {
        const {page, pageData} = window.loraTrain, place = page.byId("lora_train_results");
        if (!place || !page.api) return false;
        if (place.dataset.attached) return true;
        if (!pageData()) return false;
        place.dataset.attached = "yes";
        // Not a text: gradio's look of texts has no business here.
        for (let outer = place.parentElement; outer && outer.id !== "lora_train"; outer = outer.parentElement) {
            outer.classList.remove("prose");
        }
        const root = window.loraTrainStudio.parts.make("div", {id: "ltr"});
        place.replaceChildren(root);
        const app = makeApp(page, root);
        build(app);
        page.showResults = (run) => {
            app.choose(run);
            page.turnTo(PAGE);
        };
        new IntersectionObserver((entries) => {
            app.inSight = entries[entries.length - 1].isIntersecting;
            if (app.inSight) app.renew();
        }).observe(root);
        document.addEventListener("visibilitychange", () => document.hidden || (app.inSight && app.renew()));
        return true;
    }

    if (results.attach) return;
    results.attach = attach;
    window.loraTrain.whenThere(attach);
})(window.loraTrainResults = window.loraTrainResults || {});
