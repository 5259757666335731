/* The page's texts in the user's language.
 *
 * A text is its own key: the English sentence, with a {field} for what it is filled with; localizations/LANGUAGE.json has the
 * translations. The scripts ask with translated("…") or, with fields, translated`…${…}`. What the server and gradio put into the
 * page is translated where it stands: a text that equals a key, or fits one with its fields, whose contents are translated in
 * their turn, or a row of such texts. What is marked translate="no" is the user's own and stays as it is.
 *
 * In the WebUI its setting Localization says which language, elsewhere the browser does. In English nothing is loaded or watched.
 */
window.loraTrainLanguage = window.loraTrainLanguage || (function() {
    "use strict";
    const ADDRESS = "./lora-train/v1/languages/", MOST_KEPT = 4000, DEEPEST = 4;
    const FIELD = /\{([A-Za-z_]\w*)\}/, FIELDS = /\{([A-Za-z_]\w*)\}/g, NAMED = /^(.+) \((\w+)\)$/;
    const ATTRIBUTES = ["title", "placeholder", "aria-label", "alt"];
    const OWN = "[translate=no], textarea, script, style";
    /** What gradio lists to choose from: its field shows what was chosen as it is, so both are shown here. */
    const CHOICES = "#lora_train [role=listbox]:not(.lts-grid), ul.options";
    /** What may stand between texts, in the order it is looked for; with `all`, only where each of them is known. */
    const LISTS = [{at: /(?<=[.!?]) (?=[A-Z"'\d(])/, key: "{first} {second}", all: true},
        {at: / · /, key: "{first} · {second}", all: true}, {at: /; /, key: "{first}; {second}", all: true}];
    /** What the beginning of another text within a field is told by. */
    const BEGINNINGS = [...LISTS.map(({at}) => at), /: /];
    const JOINTS = [
        {at: /(?<=[.!?]) (?=[A-Z"'\d(])/, key: "{first} {second}"}, {at: / · /, key: "{first} · {second}"},
        {at: /; /, key: "{first}; {second}"}, {at: /: (.*)/s, key: "{first}: {second}"},
        {at: /, /, key: "{first}, {second}", all: true}, {at: / and /, key: "{first} and {second}", all: true},
    ];

    /** How what fills a field looks: a number, "3 pictures", or anything. */
    const FILLING = [[/^(number|seconds)/, "([\\d.,]+)"], [/^counted_/, "(\\d[\\s\\S]*?)"], [/^/, "([\\s\\S]+?)"]];
    /** exact: key -> translation; shapes: key without the names of its fields -> [translation, names]; the templates by the
     * word they begin with, those that begin with a field under "". */
    const known = {exact: new Map(), shapes: new Map(), begins: new Map()};
    const kept = new Map(), made = new Set();

    // ---- which language ----------------------------------------------------------------------------------------------

    /** One of ours for a tag of the browser's, or for the name of a localisation of the WebUI's; "" for any other. */
    function ours(name) {
        if (/^ja|japan|日本/i.test(name)) return "ja_JP";
        if (!/^zh|chinese|中文|hans|hant|[简繁]/i.test(name)) return "";
        return /hant|tw|hk|mo\b|traditional|繁/i.test(name) ? "zh_TW" : "zh_CN";
    }

    /** The WebUI's setting; undefined where there is no WebUI. */
    function localization() {
        const components = (window.gradio_config && window.gradio_config.components) || [];
        const settings = components.find((one) => one.props && one.props.elem_id === "settings_json");
        try {
            return settings && (JSON.parse(settings.props.value).localization || "None");
        } catch (error) {
            return "None";
        }
    }

    function chosen() {
        const setting = localization();
        if (setting !== undefined) return ours(setting);
        const first = (navigator.languages || [navigator.language]).find((tag) => ours(tag) || /^en\b/i.test(tag));
        return ours(first || "");
    }

    // ---- the catalogue -------------------------------------------------------------------------------------------------

    const plain = (text) => text.replace(/[.*+?^${}()|[\]\\]/g, "\\$&");
    const shapeOf = (key) => key.replace(FIELDS, "\u0000");
    const namesIn = (key) => [...key.matchAll(FIELDS)].map(([, name]) => name);
    const firstWord = (text) => text.slice(0, (text + " ").indexOf(" "));

    function learn(catalogue) {
        for (const [key, translation] of Object.entries(catalogue)) {
            if (!translation) continue;
            known.exact.set(key, translation);
            if (!FIELD.test(key)) continue;
            const names = namesIn(key), parts = key.split(FIELD).filter((_, index) => index % 2 === 0);
            known.shapes.set(shapeOf(key), [translation, names]);
            // Too few words of its own to be known by: only the scripts say it, which name it.
            const words = parts.join(" ").match(/[A-Za-z]{2,}/g) || [];
            if (words.length < (parts[0] || /^(number|counted_|seconds)/.test(names[0]) ? 1 : 2)) continue;
            const fieldPatterns = names.map((name) => FILLING.find(([named]) => named.test(name))[1]);
            const pattern = new RegExp("^" + parts.map((part, index) => plain(part) + (fieldPatterns[index] || "")).join("") + "$");
            const begin = parts[0].includes(" ") ? firstWord(parts[0]) : "";
            if (!known.begins.has(begin)) known.begins.set(begin, []);
            known.begins.get(begin).push({pattern, names, translation, length: parts.join("").length});
        }
        for (const list of known.begins.values()) list.sort((a, b) => b.length - a.length);
    }

    const filled = (translation, values) => translation.replace(FIELDS, (field, name) => (name in values ? values[name] : field));

    // ---- translating ---------------------------------------------------------------------------------------------------

    /** The translation of a text that the page shows, null where there is none. */
    function find(text, depth = 0) {
        if (!known.exact.size || depth > DEEPEST || !/[A-Za-z]{2}/.test(text)) return null;
        if (!kept.has(text)) {
            if (kept.size > MOST_KEPT) {
                kept.clear();
                made.clear();
            }
            kept.set(text, whole(text, depth) || row(text, depth, JOINTS, find));
        }
        return kept.get(text);
    }

    /** Of a text all of which is known: one text, or a list of them, which is one before a field takes in what it goes on with. */
    function whole(text, depth = 0) {
        if (depth > DEEPEST) return null;
        return alone(text, depth, true) || row(text, depth, LISTS, whole) || alone(text, depth);
    }

    /** Of one text: as it is, without its full stop or with one, or as it stands behind a colon. With `strict` no field takes in
     * the beginning of another text: only the last may hold several, all of which are known. */
    function alone(text, depth, strict = false) {
        const plainly = (text) => known.exact.get(text) || fitting(text, depth, strict);
        const found = plainly(text);
        if (found) return found;
        const small = text[0].toLowerCase() + text.slice(1), bare = text.replace(/\.$/, "");
        if (bare !== text) {
            const open = plainly(bare) || plainly(small.slice(0, -1));
            return open && open + (known.exact.get("{sentence}.") || "{sentence}.").replace(FIELDS, "");
        }
        const closed = plainly(text + ".");
        return closed ? closed.replace(/[.。]$/, "") : small !== text && plainly(small);
    }

    /** By the template with the most words of its own that it fits. */
    function fitting(text, depth, strict) {
        const candidates = [...(known.begins.get(firstWord(text)) || []), ...(known.begins.get("") || [])];
        let best = null;
        for (const candidate of candidates) {
            if (best && best.length >= candidate.length) continue;
            const found = candidate.pattern.exec(text);
            const takesMore = (part, index, {length}) => BEGINNINGS.some((at) => at.test(part)) &&
                (index < length - 1 || !whole(part, depth + 1));
            if (found && !(strict && found.slice(1).some(takesMore))) best = {...candidate, found};
        }
        if (!best) return null;
        return filled(best.translation, Object.fromEntries(best.names.map((name, index) =>
            [name, inside(name, best.found[index + 1], depth + 1)])));
    }

    /** What stands in a field: a single word is a name or a value and stays, unless it is a setting's. */
    function inside(name, text, depth) {
        const named = NAMED.exec(text);
        if (named && known.exact.has(named[1])) {
            return filled(known.exact.get("{label} ({setting})") || "{label} ({setting})",
                {label: known.exact.get(named[1]), setting: named[2]});
        }
        return ((text.includes(" ") || name === "setting_label") && find(text, depth)) || text;
    }

    /** Of several texts one after the other. */
    function row(text, depth, joints, part) {
        for (const {at, key, all} of joints) {
            const parts = text.split(at).filter(Boolean);
            if (parts.length < 2) continue;
            const found = parts.map((one) => part(one, depth + 1));
            if (all ? !found.every(Boolean) : !found.some(Boolean)) continue;
            const joint = (known.exact.get(key) || key).replace(FIELDS, "");
            return found.map((one, index) => one || parts[index]).join(joint);
        }
        return null;
    }

    /** A text in the user's language; as a tag of a template literal, with its fields as they are. */
    function translated(text, ...values) {
        if (!Array.isArray(text)) return noted(text && find(String(text))) || text;
        const [translation, names] = known.shapes.get(text.join("\u0000")) || [];
        if (translation) return noted(filled(translation, Object.fromEntries(names.map((name, at) => [name, values[at]]))));
        return text.reduce((said, part, index) => said + values[index - 1] + part);
    }

    /** A translation, which is not to be translated once more where it stands in the page. */
    function noted(translation) {
        if (translation) made.add(translation);
        return translation;
    }

    // ---- what others put into the page ---------------------------------------------------------------------------------

    function translateNode(node) {
        const bare = node.data.trim();
        if (!bare || made.has(bare) || !node.parentElement || node.parentElement.closest(OWN)) return;
        const choice = node.parentElement.closest(CHOICES), meant = choice ? known.exact.get(bare) : find(bare);
        const found = noted(choice && meant ? `${bare} · ${meant}` : meant);
        if (found && found !== bare) node.data = node.data.replace(bare, () => found);
    }

    function translateAttributes(element) {
        if (element.closest(OWN) && !element.matches("textarea")) return;
        for (const name of ATTRIBUTES) {
            const text = element.getAttribute(name), found = text && !made.has(text) && noted(find(text));
            if (found && found !== text) element.setAttribute(name, found);
        }
    }

    function translateTree(root) {
        if (root.nodeType === Node.TEXT_NODE) return translateNode(root);
        if (root.nodeType !== Node.ELEMENT_NODE) return null;
        const walker = document.createTreeWalker(root, NodeFilter.SHOW_TEXT | NodeFilter.SHOW_ELEMENT);
        for (let node = root; node; node = walker.nextNode()) {
            if (node.nodeType === Node.TEXT_NODE) {
                translateNode(node);
            } else {
                translateAttributes(node);
            }
        }
        return null;
    }

    /** Translate what is in `root`, and what comes into it. */
    async function watch(root) {
        await ready;
        if (!known.exact.size) return;
        root.lang = language.tag;
        translateTree(root);
        new MutationObserver((changes) => changes.forEach(({type, target, addedNodes}) => {
            if (type === "childList") addedNodes.forEach(translateTree);
            if (type === "characterData") translateNode(target);
            if (type === "attributes") translateAttributes(target);
        })).observe(root, {
            childList: true, subtree: true, characterData: true, attributes: true, attributeFilter: ATTRIBUTES,
        });
    }

    async function load(name) {
        const response = await fetch(ADDRESS + name + ".json");
        if (response.ok) learn(await response.json());
    }

    const name = chosen();
    /** Done when texts can be translated, or will not be. */
    const ready = name ? load(name).catch((error) => console.warn("Train LoRA stays in English:", error)) : Promise.resolve();
    /** `tag` is the language as the browser names it, undefined for its own. */
    const language = {translated, watch, ready, tag: name ? name.replace("_", "-") : undefined};
    return language;
})();
