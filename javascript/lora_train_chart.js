/* What charts are drawn of: shapes, round numbers at axes, smoothing. loraTrainCurve puts them together.
 */
window.loraTrainChart = (function() {
    "use strict";
    const SVG = "http://www.w3.org/2000/svg";

    function shape(tag, attributes, text) {
        const made = document.createElementNS(SVG, tag);
        for (const name of Object.keys(attributes)) made.setAttribute(name, attributes[name]);
        if (text !== undefined) made.textContent = text;
        return made;
    }

    function element(tag, className, text) {
        const made = document.createElement(tag);
        if (className) made.className = className;
        if (text !== undefined) made.textContent = text;
        return made;
    }

    /** [x, y] pairs with a moving average over about a twelfth of the curve, without the pull of a first value. */
    function smoothed(points) {
        const keep = 1 - 1 / Math.max(5, points.length / 12);
        let sum = 0, weight = 0;
        return points.map(([x, y]) => {
            sum = keep * sum + (1 - keep) * y;
            weight = keep * weight + (1 - keep);
            return [x, sum / weight];
        });
    }

    /** About `count` round numbers between low and high. */
    function ticks(low, high, count) {
        const rough = (high - low) / count, magnitude = 10 ** Math.floor(Math.log10(rough));
        const spacing = [1, 2, 5, 10].map((factor) => factor * magnitude).find((size) => size >= rough * 0.999);
        const found = [];
        for (let n = Math.ceil(low / spacing - 1e-9); n * spacing <= high + spacing * 1e-6; n++) found.push(n * spacing);
        return {values: found, digits: Math.max(0, -Math.floor(Math.log10(spacing) + 1e-9))};
    }

    /** [lowest, highest] loss to show: a few wild steps must not flatten the curve, so that of 98 % of the steps. */
    function robustRange(points) {
        const sorted = points.map((point) => point[1]).sort((a, b) => a - b);
        const at = (share) => sorted[Math.round(share * (sorted.length - 1))];
        const margin = (at(0.99) - at(0.01)) * 0.08 || Math.abs(at(0.5)) * 0.1 || 0.01;
        return [Math.max(0, at(0.01) - margin), at(0.99) + margin];
    }

    /** The one of `list` whose step is nearest to that one; null of an empty list. */
    function nearest(list, step, stepOf) {
        let found = null;
        for (const entry of list) {
            if (found === null || Math.abs(stepOf(entry) - step) < Math.abs(stepOf(found) - step)) found = entry;
        }
        return found;
    }

    /** By how many per cent the losses with the LoRA are lower than those of the base model, in the mean of the logarithms over
     * the bands of timesteps, as the verdict says it; null where there are none. */
    function better(adapted, unadapted) {
        const logarithms = adapted.map((loss, band) => Math.log(loss / unadapted[band]));
        const mean = logarithms.reduce((sum, value) => sum + value, 0) / logarithms.length;
        return Number.isFinite(mean) ? 100 * (1 - Math.exp(mean)) : null;
    }

    /** "+12.3 %" */
    const percent = (value) => (value < 0 ? "\u2212" : "+") + Math.abs(value).toFixed(Math.abs(value) < 9.95 ? 1 : 0) + " %";

    return {shape, element, better, percent, smoothed, ticks, robustRange, nearest};
})();
