/* The loss curve of the tab "Train LoRA": every step faint, their moving average strong, numbers at the axes.
 *
 * loraTrainCurve(frame, points, cursor, translated) draws into an element that has a size. points are [step, loss, …],
 * two at least; cursor is the pointer's x in pixels, null where it is elsewhere. Colours come from style.css.
 */
window.loraTrainCurve = (function() {
    "use strict";
    const SVG = "http://www.w3.org/2000/svg";
    const PAD = {left: 48, right: 8, top: 20, bottom: 22};

    function shape(tag, attributes, text) {
        const made = document.createElementNS(SVG, tag);
        for (const name of Object.keys(attributes)) made.setAttribute(name, attributes[name]);
        if (text !== undefined) made.textContent = text;
        return made;
    }

    /** A moving average over about a twelfth of the curve, without the pull of a first value. */
    function smoothed(points) {
        const keep = 1 - 1 / Math.max(5, points.length / 12);
        let sum = 0, weight = 0;
        return points.map(([step, loss]) => {
            sum = keep * sum + (1 - keep) * loss;
            weight = keep * weight + (1 - keep);
            return [step, sum / weight];
        });
    }

    /** About `count` round numbers between low and high. */
    function ticks(low, high, count) {
        const rough = (high - low) / count, magnitude = 10 ** Math.floor(Math.log10(rough));
        const spacing = [1, 2, 5, 10].map((factor) => factor * magnitude).find((size) => size >= rough * 0.999);
        const found = [];
        for (let n = Math.ceil(low / spacing - 1e-9); n * spacing <= high * (1 + 1e-9); n++) found.push(n * spacing);
        return {values: found, digits: Math.max(0, -Math.floor(Math.log10(spacing) + 1e-9))};
    }

    /** [lowest, highest] loss to show: a few wild steps must not flatten the curve, so that of 98 % of the steps. */
    function range(points) {
        const sorted = points.map((point) => point[1]).sort((a, b) => a - b);
        const at = (share) => sorted[Math.round(share * (sorted.length - 1))];
        const margin = (at(0.99) - at(0.01)) * 0.08 || Math.abs(at(0.5)) * 0.1 || 0.01;
        return [Math.max(0, at(0.01) - margin), at(0.99) + margin];
    }

    /** The numbers at the axes, and a line for each loss. */
    function axes(frame, low, high, first, last) {
        const vertical = ticks(low, high, 4);
        const horizontal = ticks(first, last, Math.max(2, Math.floor(frame.width / 110)));
        return [
            ...vertical.values.flatMap((value) => {
                const y = frame.y(value), text = value.toFixed(vertical.digits);
                return [
                    shape("line", {class: "grid", x1: PAD.left, x2: frame.width - PAD.right, y1: y, y2: y}),
                    shape("text", {x: PAD.left - 6, y: y + 4, "text-anchor": "end"}, text),
                ];
            }),
            ...horizontal.values.filter(Number.isInteger).map((value) => shape(
                "text", {x: frame.x(value), y: frame.height - 5, "text-anchor": "middle"}, String(value))),
        ];
    }

    /** The line above the curve: what it is, or the step under the pointer. */
    function caption(frame, points, smooth, cursor, translated) {
        if (cursor === null) {
            return [shape("text", {x: PAD.left, y: 12}, translated("Loss, each step and smoothed"))];
        }
        let nearest = 0;
        points.forEach((point, index) => {
            if (Math.abs(frame.x(point[0]) - cursor) < Math.abs(frame.x(points[nearest][0]) - cursor)) nearest = index;
        });
        const [step, loss] = points[nearest], x = frame.x(step);
        const text = `step ${step} · loss ${loss.toPrecision(4)} · smoothed ${smooth[nearest][1].toPrecision(4)}`;
        return [
            shape("line", {class: "cursor", x1: x, x2: x, y1: PAD.top, y2: frame.height - PAD.bottom}),
            shape("text", {x: PAD.left, y: 12}, text),
        ];
    }

    return function(element, points, cursor, translated) {
        const width = element.clientWidth, height = element.clientHeight;
        if (!width || !height) return;
        const [low, high] = range(points), smooth = smoothed(points);
        const first = points[0][0], last = points[points.length - 1][0];
        const frame = {
            width: width,
            height: height,
            x: (step) => PAD.left + (step - first) / (last - first) * (width - PAD.left - PAD.right),
            y: (loss) => {
                const inside = Math.min(high, Math.max(low, loss));
                return height - PAD.bottom - (inside - low) / (high - low) * (height - PAD.top - PAD.bottom);
            },
        };
        const at = ([step, loss]) => frame.x(step).toFixed(1) + "," + frame.y(loss).toFixed(1);
        const path = (list) => "M" + list.map(at).join("L");
        const drawing = shape("svg", {viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": "Loss by step"});
        drawing.append(
            ...axes(frame, low, high, first, last),
            shape("path", {class: "raw", d: path(points)}), shape("path", {class: "smooth", d: path(smooth)}),
            ...caption(frame, points, smooth, cursor, translated));
        element.replaceChildren(drawing);
    };
})();
