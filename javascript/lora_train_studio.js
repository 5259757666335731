/* The page "1 Dataset": what it knows, when it asks, and how its parts hear of a change.
 *
 * Each part (gallery, tags, panels, …) is made once with `app` and draws itself anew on app.draw(). What the parts share
 * is in app.view: the server's state, the page of pictures that is shown, the filter, the selection.
 * The server is asked every second while it works, every five otherwise, and never out of sight.
 */
(function(studio) {
    "use strict";
    const WORKING_MS = 1000, QUICK_MS = 250, QUICK = 8, IDLE_MS = 5000, FILTER_MS = 250;
    const PAGE = 48, PAGE_KEY = "lora_train_page";
    const NO_FILTER = {
        all_of: [], any_of: [], none_of: [], prefix: "", suffix: "", text: "", regex: "", problem: "", changed_only: false,
        empty_only: false,
    };

    const byId = (id) => (typeof gradioApp === "function" ? gradioApp() : document).querySelector("#" + id);

    function makeApp(place, token) {
        const {translated} = studio.parts;
        const api = studio.makeApi(token);
        const app = {
            api, place, pictures: studio.makePictures(api), uploading: "", panel: "", written: null, tagValues: {},
            modeChosen: false, changedAt: 0,
            // Captions that were written here and that the server did not take, by picture; the state of another dataset that was
            // opened elsewhere, until this page is told which one to show.
            unsent: new Map(), elsewhere: null,
            view: {
                state: null, filter: {...NO_FILTER}, offset: 0, sort: "name", shown: {total: 0, pictures: []}, tags: [],
                tagsTotal: 0, empty: 0, selected: new Set(), current: "",
            },
        };
        const view = app.view, after = new Map();
        let timer = 0, version = -1, polling = null, again = false, quick = 0, parts = [], reloading = 0, moving = 0, wished = "", beginning = false;

        // ---- asking ------------------------------------------------------------------------------------------------

        /** What is chosen for training, on the other page: the size, and what decides which pictures are held out. */
        app.sizes = () => window.loraTrain.chosen(["resolution", "enable_bucket", "min_bucket_reso", "max_bucket_reso",
            "bucket_reso_steps", "bucket_no_upscale", "validation_split", "seed"]);
        app.dataset = () => view.state && view.state.dataset;
        app.task = () => view.state && view.state.task;
        app.working = () => Boolean(app.task() && app.task().running);

        function schedule(milliseconds) {
            clearTimeout(timer);
            if (app.inSight && !document.hidden) timer = setTimeout(app.poll, milliseconds);
        }

        /** Look once; the pictures are asked for anew when the server's version says that something changed. */
        app.poll = () => {
            // An answer that is under way may be older than what was asked for meanwhile.
            again = Boolean(polling);
            polling = polling || look();
            return polling;
        };

        async function look() {
            clearTimeout(timer);
            try {
                do {
                    again = false;
                    await takeState(await api.ask("state"));
                } while (again);
            } catch (error) {
                app.say(error.message, true);
            } finally {
                polling = null;
                // Most work is short.
                quick = app.working() ? quick - 1 : 0;
                schedule(!app.working() ? IDLE_MS : quick > 0 ? QUICK_MS : WORKING_MS);
            }
        }

        async function takeState(state) {
            const before = view.state, task = state.task, away = app.elsewhere;
            const other = Boolean(before && (before.dataset || {}).folder !== (state.dataset || {}).folder);
            app.elsewhere = other && !moving ? state : null;
            // What is shown, and what is being written, stays until somebody here goes there.
            if (app.elsewhere) return app.draw();
            if (other) app.forget();
            view.state = state;
            api.dataset = state.dataset ? state.dataset.name : "";
            // Not waited for: it asks for the state itself.
            if (away && app.unsent.size) app.resend();
            if (state.version !== version) {
                version = state.version;
                app.changedAt = Date.now();
                await app.reload();
            }
            app.draw();
            app.checkAnew(state);
            if (task && !task.running && after.has(task.id)) {
                const then = after.get(task.id);
                after.delete(task.id);
                // Not waited for: it asks for the state itself.
                Promise.resolve(then(task)).catch((error) => app.say(error.message, true));
            }
        }

        /** The page of pictures, the tags and how many captions are missing. */
        app.reload = async() => {
            const mine = ++reloading, filter = view.filter;
            if (!app.dataset()) {
                Object.assign(view, {shown: {total: 0, pictures: []}, tags: [], tagsTotal: 0, empty: 0});
                return;
            }
            const [shown, tags, empty] = await Promise.all([
                api.ask("pictures", {filter, offset: view.offset, limit: PAGE, sort: view.sort}),
                api.ask("tags", {filter}),
                api.ask("pictures", {filter: {...NO_FILTER, empty_only: true}, offset: 0, limit: 1, sort: "name"}),
            ]);
            // A newer question is under way.
            if (mine !== reloading) return;
            if (!shown.pictures.length && view.offset > 0) {
                view.offset = Math.floor(Math.max(0, shown.total - 1) / PAGE) * PAGE;
                return app.reload();
            }
            Object.assign(view, {shown, tags: tags.tags, tagsTotal: tags.total, empty: empty.total});
        };

        /** Do what a press asked for: `what` may ask the server; what it refuses is said. Then look again. */
        app.act = async(what, said) => {
            app.say("");
            try {
                const answer = await what();
                await app.poll();
                if (said) app.say(typeof said === "function" ? said(answer) : translated(said));
                return answer;
            } catch (error) {
                app.say(error.message, true);
                // Refused: perhaps another dataset is open now.
                if (error.status === 409) app.poll();
                return null;
            }
        };

        /** Do what makes another dataset the open one, and follow it there. */
        app.move = async(what) => {
            moving += 1;
            try {
                const answer = await what();
                await app.poll();
                return answer;
            } finally {
                moving -= 1;
            }
        };

        /** Start work on the server; `then` is called with the task once it ended. Asking for the same while it begins or goes
         * on, as a double click does, changes nothing. */
        app.start = async(path, body, then) => {
            const wish = JSON.stringify([path, body]);
            if (wish === wished && (beginning || app.working())) return null;
            wished = wish;
            beginning = true;
            return app.act(() => begin(path, body, then));
        };

        async function begin(path, body, then) {
            const answer = await api.ask(path, body).finally(() => {
                beginning = false;
            });
            app.watched = answer.id;
            quick = QUICK;
            if (then) after.set(answer.id, then);
            return answer;
        }

        /** Go to a dataset; what was mended while it was opened is said. */
        app.enter = (body) => app.act(() => app.move(() => api.ask("open", body)), ({notes}) => notes.join(" "));

        // ---- what is shown, what is meant ------------------------------------------------------------------------------

        app.forget = () => {
            Object.assign(view, {filter: {...NO_FILTER}, offset: 0, sort: "name", current: ""});
            view.selected.clear();
            app.unsent.clear();
            // The trigger word and the mode were those of another dataset.
            app.tagValues = {};
            app.modeChosen = false;
        };

        app.page = PAGE;
        app.turn = (offset) => {
            view.offset = Math.max(0, offset);
            return app.act(app.reload).then(app.draw);
        };

        const filterSoon = studio.parts.later(() => app.turn(0), FILTER_MS);
        app.filterBy = (changed, soon) => {
            view.filter = {...view.filter, ...changed};
            view.selected.clear();
            return soon ? filterSoon() : app.turn(0);
        };
        app.filtered = () => JSON.stringify(view.filter) !== JSON.stringify(NO_FILTER);
        app.unfilter = (changed) => app.filterBy({...NO_FILTER, ...changed});

        /** What a batch operation is about: the selected pictures, or all that the filter lets through. */
        app.scope = () => (view.selected.size ? {ids: [...view.selected]} : {filter: view.filter});
        app.scopeSize = () => view.selected.size || view.shown.total;
        app.scopeWords = () => {
            const {count} = studio.parts;
            if (view.selected.size) return count(view.selected.size, "selected picture");
            return count(view.shown.total, app.filtered() ? "filtered picture" : "picture");
        };
        app.current = () => view.shown.pictures.find((picture) => picture.id === view.current) || null;

        /** Close a panel whose work is done, but not another one that was opened meanwhile. */
        app.leave = (panel) => {
            if (app.panel === panel) app.panel = "";
        };
        app.open = (panel) => {
            app.panel = app.panel === panel ? "" : panel;
            app.draw();
        };

        app.say = (text, problem) => {
            app.said = {text, problem: Boolean(problem)};
            drawSaid();
        };

        function drawSaid() {
            const line = app.notice;
            if (!line) return;
            line.hidden = !app.said.text;
            line.textContent = studio.parts.translated(app.said.text);
            line.classList.toggle("lts-problem", app.said.problem);
        }

        // ---- drawing -------------------------------------------------------------------------------------------------

        app.draw = () => {
            for (const part of parts) part.draw();
        };
        app.build = (made) => {
            parts = made;
        };
        return app;
    }

    // ---- the page -------------------------------------------------------------------------------------------------------

    function build(app) {
        const {make} = studio.parts;
        const top = studio.top(app), elsewhere = studio.elsewhere(app), welcome = studio.welcome(app), panels = studio.panels(app);
        const gallery = studio.gallery(app), tags = studio.tags(app), editor = studio.editor(app);
        app.notice = make("div", {class: "lts-notice", role: "status", hidden: true});
        const work = make("div", {class: "lts-work"},
            make("div", {class: "lts-main"}, gallery.element),
            make("div", {class: "lts-side"}, editor.element, tags.element));
        work.hidden = true;
        app.place.replaceChildren(elsewhere.element, top.element, app.notice, top.progress, welcome.element, panels.element, work);
        const all = {draw: () => {
            const dataset = app.dataset();
            app.place.classList.toggle("lts-loading", !app.view.state);
            work.hidden = !dataset || !dataset.pictures;
        }};
        app.build([all, elsewhere, top, welcome, panels, gallery, tags, editor]);
        studio.checking(app);
        studio.cropping(app);
        studio.captioning(app);
        studio.keys(app, gallery);
        studio.dropping(app);
    }

    /** The buttons of the pages, as gradio made them. */
    function pageButtons() {
        return [...byId("lora_train_pages").querySelectorAll(".tab-nav > button, [role=tablist] button[role=tab]")];
    }

    function turnTo(number) {
        const pages = pageButtons();
        if (pages[number]) pages[number].click();
    }

    /** The page that was open last comes back with a reload. */
    function rememberPage() {
        // gradio makes the buttons anew with each press, so the press is heard above them, and before gradio hears it.
        byId("lora_train_pages").addEventListener("click", (event) => {
            const number = pageButtons().indexOf(event.target.closest("button"));
            try {
                if (number >= 0) localStorage.setItem(PAGE_KEY, String(number));
            } catch (error) { /* a browser that keeps nothing */ }
        }, true);
        try {
            const last = Number(localStorage.getItem(PAGE_KEY));
            if (last) turnTo(last);
        } catch (error) { /* a browser that keeps nothing */ }
    }

    function attach() {
        const place = byId("lora_train_studio");
        if (!place || !byId("lora_train_pages")) return false;
        if (place.dataset.attached) return true;
        const data = window.loraTrain.pageData();
        if (!data) return false;
        place.dataset.attached = "yes";
        // Not a text: gradio's look of texts has no business here.
        for (let outer = place.parentElement; outer && outer.id !== "lora_train"; outer = outer.parentElement) {
            outer.classList.remove("prose");
        }
        const root = studio.parts.make("div", {id: "lts"});
        place.replaceChildren(root);
        const app = makeApp(root, data.token);
        app.turnTo = turnTo;
        studio.app = app;
        build(app);
        rememberPage();
        new IntersectionObserver((entries) => {
            app.inSight = entries[entries.length - 1].isIntersecting;
            if (app.inSight) app.poll();
        }).observe(root);
        document.addEventListener("visibilitychange", () => document.hidden || (app.inSight && app.poll()));
        window.addEventListener("beforeunload", (event) => {
            // Captions live on the server; only an upload would be cut off, and what the server did not take.
            if (app.uploading || app.unsent.size) event.preventDefault();
        });
        return true;
    }

    if (studio.attach) return;
    Object.assign(studio, {attach, turnTo});
    // lora_train.js comes before this file, in the WebUI by its name, elsewhere by the list of standalone.py.
    window.loraTrain.whenThere(attach);
})(window.loraTrainStudio = window.loraTrainStudio || {});
