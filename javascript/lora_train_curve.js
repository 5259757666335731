/* The curve of a run: by how much the LoRA is better than the base model, on held-out and on training pictures; behind it the
 * loss of each step, below it the learning rate. Where nothing was measured, the loss itself with its moving average.
 *
 * loraTrainCurve(frame, translated) fills an element that has a size and returns draw(data):
 *     points    [step, loss, …] of steps
 *     rates     [step, learning rate]
 *     measured  measurements as the API has them, each with what it is better by: over all, and in each of three bands of timesteps
 *     saves     steps at which a file was saved
 * Colours come from style_results.css.
 */
window.loraTrainCurve = (function() {
    "use strict";
    const PAD = {left: 46, right: 46, top: 10, bottom: 20}, STRIP = 26, GAP = 14;
    const BANDS = ["fine", "middle", "coarse"];

    /** [step, per cent] of each measurement: over all, or in a band of timesteps, from 1 on. */
    function betterBy(measured, kind, band = 0) {
        return measured.map((entry) => [entry.step, entry.better[kind][band]]).filter(([, value]) => Number.isFinite(value));
    }

    function percentRange(lines) {
        const values = lines.flat().map((point) => point[1]);
        const low = Math.min(0, ...values), high = Math.max(2, ...values), margin = (high - low) * 0.08;
        return [low < 0 ? low - margin : 0, high + margin];
    }

    /** Everything that is drawn, from the data; null where there is too little. */
    function read(data) {
        const {smoothed, robustRange} = window.loraTrainChart;
        const points = (data.points || []).filter((point) => point[1] !== null);
        const measured = data.measured || [], rates = (data.rates || []).filter((point) => point[1] !== null);
        const heldOut = betterBy(measured, "held_out"), training = betterBy(measured, "training");
        const shown = heldOut.length > 1 || training.length > 1;
        if (points.length < 2 && !shown) return null;
        const main = heldOut.length > 1 ? "held_out" : "training";
        const steps = [...points, ...heldOut, ...training].map((point) => point[0]);
        return {
            points, measured, rates, saves: data.saves || [], shown, main, heldOut, training,
            bands: shown ? BANDS.map((_, index) => betterBy(measured, main, index + 1)) : [],
            smooth: points.length > 1 ? smoothed(points) : [],
            loss: points.length > 1 ? robustRange(points) : null, percent: shown ? percentRange([heldOut, training]) : null,
            first: Math.min(...steps), last: Math.max(...steps),
        };
    }

    /** Where a step and a value are, in pixels. */
    function placed(curve, width, height) {
        const right = curve.shown && curve.loss ? PAD.right : 12, strip = curve.rates.length > 1 ? STRIP + GAP : 0;
        const bottom = height - PAD.bottom - strip, inside = bottom - PAD.top;
        const x = (step) => PAD.left + (step - curve.first) / Math.max(1, curve.last - curve.first) * (width - PAD.left - right);
        const y = ([low, high]) => (value) => bottom - (Math.min(high, Math.max(low, value)) - low) / (high - low) * inside;
        const stepAt = (pixel) => curve.first + (pixel - PAD.left) / (width - PAD.left - right) * (curve.last - curve.first);
        return {
            width, height, left: PAD.left, right: width - right, top: PAD.top, bottom, x, stepAt,
            percent: curve.percent ? y(curve.percent) : null, loss: curve.loss ? y(curve.loss) : null,
            stripTop: bottom + GAP, stripBottom: bottom + GAP + STRIP,
        };
    }

    const path = (points, x, y) => "M" + points.map(([step, value]) => x(step).toFixed(1) + "," + y(value).toFixed(1)).join("L");

    function axes(curve, at) {
        const {shape, ticks} = window.loraTrainChart, made = [];
        const [range, y] = curve.shown ? [curve.percent, at.percent] : [curve.loss, at.loss];
        const vertical = ticks(range[0], range[1], 4);
        for (const value of vertical.values) {
            const zero = curve.shown && Math.abs(value) < 1e-9;
            made.push(shape("line", {class: zero ? "grid zero" : "grid", x1: at.left, x2: at.right, y1: y(value), y2: y(value)}));
            const text = value.toFixed(vertical.digits) + (curve.shown ? " %" : "");
            made.push(shape("text", {x: at.left - 6, y: y(value) + 4, "text-anchor": "end"}, zero ? "0" : text));
        }
        if (curve.shown && curve.loss) {
            const right = ticks(curve.loss[0], curve.loss[1], 3);
            made.push(...right.values.map((value) => shape(
                "text", {class: "faint", x: at.right + 6, y: at.loss(value) + 4}, value.toFixed(right.digits))));
        }
        const horizontal = ticks(curve.first, curve.last, Math.max(2, Math.floor(at.width / 110)));
        made.push(...horizontal.values.filter(Number.isInteger).map((value) => shape(
            "text", {x: at.x(value), y: at.height - 5, "text-anchor": "middle"}, String(value))));
        return made;
    }

    /** The learning rate on a scale of its own, from 0. */
    function strip(curve, at, translated) {
        if (curve.rates.length < 2) return [];
        const {shape} = window.loraTrainChart, highest = Math.max(...curve.rates.map((point) => point[1])) || 1;
        const y = (rate) => at.stripBottom - rate / highest * STRIP, line = path(curve.rates, at.x, y);
        const end = at.x(curve.rates[curve.rates.length - 1][0]), begin = at.x(curve.rates[0][0]);
        return [
            shape("path", {class: "rate", d: `${line}L${end},${at.stripBottom}L${begin},${at.stripBottom}Z`}),
            shape("text", {x: at.left - 6, y: at.stripTop + 9, "text-anchor": "end"}, highest.toExponential(0).replace("e-", "e\u2212")),
            shape("title", {}, translated("Learning rate")),
        ];
    }

    function lines(curve, at) {
        const {shape} = window.loraTrainChart, made = [];
        for (const step of curve.saves) {
            if (step >= curve.first && step <= curve.last) {
                made.push(shape("line", {class: "save", x1: at.x(step), x2: at.x(step), y1: at.top, y2: at.bottom}));
            }
        }
        if (curve.points.length > 1) {
            made.push(shape("path", {class: curve.shown ? "raw behind" : "raw", d: path(curve.points, at.x, at.loss)}));
            made.push(shape("path", {class: curve.shown ? "smooth behind" : "smooth", d: path(curve.smooth, at.x, at.loss)}));
        }
        if (!curve.shown) return made;
        for (const band of curve.bands) {
            if (band.length > 1) made.push(shape("path", {class: "band", d: path(band, at.x, at.percent)}));
        }
        for (const [name, list] of [["training", curve.training], ["held-out", curve.heldOut]]) {
            if (list.length < 2) continue;
            made.push(shape("path", {class: name, d: path(list, at.x, at.percent)}));
            if (list.length < 60) {
                made.push(...list.map(([step, value]) => shape(
                    "circle", {class: name, cx: at.x(step), cy: at.percent(value), r: name === "held-out" ? 3 : 2})));
            }
        }
        return made;
    }

    /** What stands in the box beside the pointer, a line each. */
    function told(curve, step, translated) {
        const {percent, nearest} = window.loraTrainChart, rows = [];
        const by = (value) => (Number.isFinite(value) ? percent(value) : "–");
        const entry = curve.shown ? nearest(curve.measured, step, (one) => one.step) : null;
        const point = nearest(curve.points, entry ? entry.step : step, (one) => one[0]);
        const at = entry ? entry.step : point[0];
        rows.push(["", translated`step ${at}`]);
        if (entry) {
            for (const [kind, name] of [["held_out", "held-out"], ["training", "training"]].filter(([kind]) => entry[kind].length)) {
                const value = by(entry.better[kind][0]);
                rows.push([name, kind === "training" ? translated`training ${value}` : translated`held-out ${value}`]);
                if (kind !== curve.main) continue;
                const [fine, middle, coarse] = entry.better[kind].slice(1).map(by);
                rows.push(["band", translated`fine ${fine} · middle ${middle} · coarse ${coarse}`]);
            }
        }
        if (point && Math.abs(point[0] - at) <= Math.max(1, (curve.last - curve.first) / 50)) {
            const smooth = nearest(curve.smooth, point[0], (one) => one[0]);
            const [loss, average] = [point, smooth].map((one) => one[1].toPrecision(3));
            rows.push(["loss", translated`loss ${loss}, smoothed ${average}`]);
        }
        const rate = nearest(curve.rates, at, (one) => one[0]);
        if (rate) rows.push(["", translated`learning rate ${rate[1].toPrecision(2)}`]);
        return {at, rows};
    }

    /** What each line is, above the drawing. */
    function legend(curve, translated) {
        const {element} = window.loraTrainChart;
        const key = (name, text) => {
            const made = element("span", "lora-train-key");
            made.append(element("i", name), text);
            return made;
        };
        if (!curve.shown) return [element("b", "", translated("Loss, each step and smoothed"))];
        const title = element("b", "", translated("Better than the base model"));
        title.title = translated("How much lower the loss is than without the LoRA, on the same pictures with the same noise. " +
            "Held-out pictures are not trained on: when their line falls while that of the training pictures rises, the LoRA " +
            "learns them by heart.");
        return [
            title, curve.heldOut.length > 1 ? key("held-out", translated("held-out pictures")) : null,
            key("training", translated("training pictures")), curve.points.length > 1 ? key("loss", translated("loss")) : null,
            curve.saves.length ? key("save", translated("saved")) : null,
        ].filter(Boolean);
    }

    function summary(curve, translated) {
        const {percent} = window.loraTrainChart;
        if (!curve.shown) return translated("Loss by step");
        const [step, value] = (curve.main === "held_out" ? curve.heldOut : curve.training).slice(-1)[0];
        return translated`Better than the base model: ${percent(value)}, step ${step}`;
    }

    return function(frame, translated) {
        const {element, shape} = window.loraTrainChart;
        const head = frame.appendChild(element("div", "lora-train-legend")), plot = frame.appendChild(element("div", "lora-train-plot"));
        const box = frame.appendChild(element("div", "lora-train-tip"));
        let curve = null, at = null, cursor = null;
        box.hidden = true;
        plot.tabIndex = 0;
        plot.setAttribute("role", "img");

        function paint() {
            const width = plot.clientWidth, height = plot.clientHeight;
            if (!curve || !width || !height) return;
            at = placed(curve, width, height);
            const drawing = shape("svg", {viewBox: `0 0 ${width} ${height}`, "aria-hidden": "true"});
            drawing.append(...axes(curve, at), ...lines(curve, at), ...strip(curve, at, translated));
            plot.replaceChildren(drawing);
            point(drawing);
        }

        function point(drawing) {
            box.hidden = cursor === null;
            plot.classList.toggle("lora-train-pointed", cursor !== null);
            if (cursor === null) return;
            const {at: step, rows} = told(curve, cursor, translated), x = at.x(step);
            drawing.append(shape("line", {class: "cursor", x1: x, x2: x, y1: at.top, y2: at.bottom}));
            box.replaceChildren(...rows.map(([kind, text]) => {
                const row = element("div", kind ? "lora-train-tip-" + kind : "");
                row.textContent = text;
                return row;
            }));
            const room = plot.clientWidth - box.offsetWidth;
            box.style.left = Math.max(0, Math.min(room, x > plot.clientWidth / 2 ? x - box.offsetWidth - 12 : x + 12)) + "px";
            box.style.top = plot.offsetTop + 4 + "px";
        }

        /** Arrows go from measurement to measurement, or over the steps where there is none. */
        function walk(event) {
            const by = {ArrowLeft: -1, ArrowRight: 1}[event.key];
            if (event.key === "Escape") cursor = null;
            if (by && curve) {
                const steps = curve.shown ? curve.measured.map((entry) => entry.step) : curve.points.map((one) => one[0]);
                const now = cursor === null ? null : told(curve, cursor, translated).at;
                const index = now === null ? steps.length - 1 : steps.indexOf(now) + by;
                cursor = steps[Math.max(0, Math.min(steps.length - 1, index))];
                event.preventDefault();
            }
            if (by || event.key === "Escape") paint();
        }

        plot.addEventListener("pointermove", (event) => {
            if (!at) return;
            cursor = at.stepAt(event.clientX - plot.getBoundingClientRect().left);
            paint();
        });
        const leave = () => {
            cursor = null;
            paint();
        };
        plot.addEventListener("pointerleave", leave);
        plot.addEventListener("blur", leave);
        plot.addEventListener("keydown", walk);
        new ResizeObserver(paint).observe(plot);

        return {
            draw: (data) => {
                curve = read(data);
                frame.hidden = !curve;
                if (!curve) return;
                head.replaceChildren(...legend(curve, translated));
                plot.setAttribute("aria-label", summary(curve, translated));
                paint();
            },
        };
    };
})();
