/* What the dataset studio asks the server, and the pictures it was given.
 *
 * Every question shows the page's token in a header, so a picture cannot be an <img> with a link: it is fetched and shown
 * from memory, and let go when it is out of use.
 */
(function(studio) {
    "use strict";
    const ROOT = "./lora-train/v1/studio/", AT_ONCE = 6, MOST_KEPT = 240;

    /**
     * A server that speaks. `ask` gives JSON, `blob` the bytes of an answer; both raise the server's sentence. Each question
     * names `dataset`, the one that is shown here: another page may have opened another. `root` is where the questions go,
     * `keep` says that the browser may keep pictures as long as the server says.
     */
    studio.makeApi = function(token, {root = ROOT, keep = false} = {}) {
        const api = {dataset: ""};

        async function fetched(path, options) {
            let response;
            try {
                const about = api.dataset ? (path.includes("?") ? "&" : "?") + "dataset=" + encodeURIComponent(api.dataset) : "";
                response = await fetch(root + path + about, {cache: "no-store", ...options});
            } catch (error) {
                if (error.name === "AbortError") throw error;
                throw new Error(studio.parts.translated("The server does not answer."));
            }
            if (!response.ok) {
                const data = await response.json().catch(() => ({}));
                const error = new Error(data.error || studio.parts.translated`The server answered ${response.status}.`);
                throw Object.assign(error, {status: response.status});
            }
            return response;
        }

        function options(body) {
            const headers = {"X-Lora-Train": token};
            if (body === undefined) return {headers};
            return {method: "POST", headers: {...headers, "Content-Type": "application/json"}, body: JSON.stringify(body)};
        }

        return Object.assign(api, {
            ask: async (path, body) => (await fetched(path, options(body))).json(),
            blob: async (path, body) => (await fetched(path, {...options(body), ...(keep ? {cache: "default"} : {})})).blob(),
            /** A file or other bytes as they are. */
            send: async(path, bytes) => (await fetched(path, {
                method: "POST", body: bytes,
                headers: {"X-Lora-Train": token, "Content-Type": "application/octet-stream"},
            })).json(),
        });
    };

    /** Shows pictures of the server in <img> elements: a few at a time, the last ones kept. */
    studio.makePictures = function(api) {
        const kept = new Map(), waiting = [];
        let busy = 0;

        function next() {
            while (busy < AT_ONCE && waiting.length) {
                const wish = waiting.shift();
                // Gone from the page while it waited.
                if (!wish.image.isConnected) continue;
                busy += 1;
                load(wish).finally(() => {
                    busy -= 1;
                    next();
                });
            }
        }

        async function load({path, image, failed}) {
            try {
                const address = kept.get(path) || URL.createObjectURL(await api.blob(path));
                keep(path, address);
                if (image.dataset.path === path) image.src = address;
            } catch (error) {
                if (image.dataset.path === path && failed) failed(error);
            }
        }

        function keep(path, address) {
            kept.delete(path);
            kept.set(path, address);
            for (const [oldest, old] of kept) {
                if (kept.size <= MOST_KEPT) break;
                kept.delete(oldest);
                URL.revokeObjectURL(old);
            }
        }

        /** Put the picture at `path` into `image` as soon as it is there. */
        function show(image, path, failed) {
            image.dataset.path = path;
            if (kept.has(path)) {
                keep(path, kept.get(path));
                image.src = kept.get(path);
                return;
            }
            waiting.push({path, image, failed});
            // The caller puts the element into the page first.
            setTimeout(next, 0);
        }

        const seen = new IntersectionObserver((entries) => entries.forEach(({isIntersecting, target}) => {
            if (!isIntersecting) return;
            seen.unobserve(target);
            show(target, target.dataset.wish);
        }), {rootMargin: "300px"});

        /** The same as soon as it comes near the part of the page that is in sight. */
        function showInSight(image, path) {
            image.dataset.wish = path;
            seen.observe(image);
        }

        return {show, showInSight};
    };
})(window.loraTrainStudio = window.loraTrainStudio || {});
