/* How the run on the page "2 Train" learns: its curve, the verdict, the pictures on the way. Measurements and samples are asked
 * for when the status says that there are new ones.
 *
 * loraTrainLearning(page, view) returns draw(status, points); `page` is that of lora_train.js, `view` that of
 * lora_train_progress.js.
 */
window.loraTrainLearning = function(page, view) {
    "use strict";
    const verdict = window.loraTrainVerdict(page), curve = window.loraTrainCurve(view.curve, page.translated);
    const drawStrip = window.loraTrainStrip(view.strip, page);
    let looked = "", results = null, last = null;

    /** Not waited for by the bar. */
    async function look(answer) {
        const now = JSON.stringify([answer.run, answer.evaluated, answer.running, answer.saved.length]);
        if (now === looked) return;
        looked = now;
        try {
            const found = answer.run ? await page.ask("results?run=" + encodeURIComponent(answer.run)) : null;
            if (last.status.run !== answer.run) return;
            results = found;
            show();
        } catch (error) {
            // The status says what there is to say; asked again when something changes.
        }
    }

    function show() {
        const {status, points} = last, step = status.step;
        const found = results && results.run === status.run ? results : {};
        const rates = (found.steps || []).map((entry) => [entry[0], entry[3]]);
        if (step && (!rates.length || rates[rates.length - 1][0] < step.step)) rates.push([step.step, step.learning_rate]);
        curve.draw({points, rates, measured: found.measured, saves: status.saved.map((file) => file.step)});
        drawStrip(status.run, found.samples);
        verdict.draw(status.diagnosed);
        // While it goes on, it explains the curve; at the end it is the answer.
        (status.finished ? view.outcome : view.curve).after(verdict.element);
    }

    return function(status, points) {
        last = {status, points};
        show();
        look(status);
    };
};
