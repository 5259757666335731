"""The layout of the tab.

Three pages: "1 Dataset" and "3 Results", which the scripts draw, and "2 Train": left the settings, right what happens with
them: the summary, the buttons, the running job and its result. Labels are short English literals, so that the WebUI's
localisation files can match them.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

import gradio as gr

from lib_lora_train.host.port import Host
from lib_lora_train.run.runner import Runner
from lib_lora_train.settings import AREAS, DECLARATIONS, Declaration, Settings, Value, declarations, flat
from lib_lora_train.settings.presets import NO_PRESET, presets
from lib_lora_train.ui.fields import element_id, field, slides, unsaved
from lib_lora_train.ui.handlers import Handlers, OpenPage

# The rows above the fold. A setting that is declared in view and missing here gets a row of its own below them.
ROWS_IN_VIEW = (
    ("output_name", "trigger_word"),
    ("train_data_dir",),
    ("max_train_epochs", "max_train_steps", "num_repeats"),
    ("train_batch_size", "learning_rate", "resolution"),
    ("network_dim", "network_alpha"),
    ("network_train_unet_only", "flip_aug"),
)
FOLDS = {"network": "Network", "optimizer": "Optimizer", "loss": "Loss", "noise": "Noise", "masks": "Masked loss",
         "preservation": "Preservation", "captions": "Captions", "dataset": "Dataset",
         "memory": "Memory", "evaluation": "Samples and measuring", "save": "Saving", "tracking": "Trackers"}
_HIDDEN = "lora-train-hidden"


def build_tab(*, runner: Runner, host: Host, token: str) -> gr.Blocks:
    """The page as gradio Blocks, to be rendered into the WebUI's tabs or into a page of its own.

    `token` opens the API to the page's script; it is part of the page's configuration, which the WebUI's login protects.
    """
    first = flat(Settings())
    fields: dict[str, Any] = {}
    with gr.Blocks(analytics_enabled=False) as tab, gr.Column(elem_id="lora_train", elem_classes=["lora-train"]):
        # The script writes the model in use into it, which may change while the page is open.
        gr.HTML('<div id="lora_train_model" class="lora-train-model"></div>', elem_id="lora_train_header")
        # Not drawn; the script reads them from the page's configuration.
        unsaved(gr.Textbox(value=_page_data(), visible=False, elem_id="lora_train_page", label="Page"))
        key = unsaved(gr.Textbox(value=token, visible=False, elem_id="lora_train_token", label="Token"))
        with unsaved(gr.Tabs(elem_id="lora_train_pages")):
            with gr.Tab("1 Dataset", elem_id="lora_train_page_dataset"):
                # Drawn by the scripts of the studio, from its API.
                gr.HTML('<div id="lora_train_studio"></div>')
            with gr.Tab("2 Train", elem_id="lora_train_page_train"), gr.Row(
                    equal_height=False, elem_classes=["lora-train-columns"]):
                with gr.Column(scale=1, min_width=320, elem_id="lora_train_settings"):
                    preset, about_preset, curve, folders = _settings_column(fields, first)
                with gr.Column(scale=1, min_width=320, elem_id="lora_train_run"):
                    summary, start, find_rate, answer, overwrite = _run_column()
            with gr.Tab("3 Results", elem_id="lora_train_page_results"):
                gr.HTML('<div id="lora_train_results"></div>')
        with gr.Row(elem_classes=[_HIDDEN]):
            draft, restored, incoming, queued, done, number, planned = (
                unsaved(gr.Textbox(value="", elem_id=element_id(name), label=name.title(), max_lines=1))
                for name in ("draft", "restored", "incoming", "queued", "enqueued", "number", "planned"))
            plan, restore, fill, enqueue = (unsaved(gr.Button(name.title(), elem_id=element_id(name)))
                                            for name in ("plan", "restore", "fill", "enqueue"))

        handlers = Handlers(runner=runner, host=host, names=(*fields, "preset"), defaults=first, token=token)
        outputs = list(fields.values())
        inputs = [*outputs, preset]
        # No handler waits for another: the queue is for images.
        quiet: dict[str, Any] = {"show_progress": "hidden", "queue": False, **_no_endpoint(gr.__version__)}
        page = gr.State(OpenPage())
        planning = {"fn": handlers.plan, "inputs": [key, page, number, preset, *inputs],
                    "outputs": [summary, draft, answer, overwrite, preset, curve, planned], **quiet}
        plan.click(**planning)
        restore.click(handlers.restore, inputs=[page, draft], outputs=[restored, summary, about_preset, preset, *outputs],
                      **quiet).then(**planning)
        fill.click(handlers.fill, inputs=[key, page, incoming], outputs=[about_preset, preset, *outputs],
                   **quiet).then(**planning)
        preset.select(handlers.apply_preset, inputs=[page], outputs=[about_preset, *outputs], **quiet).then(**planning)
        folders.click(handlers.list_folders, inputs=[key, page, *inputs],
                      outputs=[fields["dataset_config"], answer, overwrite], **quiet).then(**planning)
        enqueue.click(handlers.enqueue, inputs=[key, page, queued, *inputs], outputs=[answer, overwrite, done], **quiet)
        for name in fields:
            if DECLARATIONS[name].choices:
                # Typed fields tell the script that they changed; a drop-down does not.
                fields[name].input(**planning)
        start.click(handlers.start, inputs=[key, page, *inputs], outputs=[answer, overwrite], **quiet).then(**planning)
        find_rate.click(handlers.find_rate, inputs=[key, page, *inputs], outputs=[answer, overwrite], **quiet).then(**planning)
        overwrite.click(handlers.start_overwriting, inputs=[key, page, *inputs], outputs=[answer, overwrite],
                        **quiet).then(**planning)
    return tab


def _no_endpoint(version: str) -> dict[str, object]:
    """The arguments with which that version of gradio makes no endpoint of its API of an event.

    gradio 4 says of every such event "Too many arguments provided for the endpoint" in the browser's console: it compares them
    with those of the endpoint, and there is none. They arrive all the same.
    """
    return {"api_visibility": "private"} if int(version.partition(".")[0]) >= 6 else {"api_name": False}


def _settings_column(fields: dict[str, Any], first: Mapping[str, Value]) -> tuple[Any, Any, Any, Any]:
    """Adds each setting's component to `fields`; returns the preset's list, the line below it, the learning rate's curve, and
    the button that lists the folders."""
    placed = {name for row in ROWS_IN_VIEW for name in row}
    left_over = tuple(d.name for d in DECLARATIONS.values() if d.in_view and d.name not in placed)
    for number, row in enumerate((*ROWS_IN_VIEW, *((left_over,) if left_over else ()))):
        with gr.Row(elem_classes=["lora-train-fields"]):
            for name in row:
                fields[name] = field(DECLARATIONS[name], first[name])
        if number == 1:
            with gr.Row(elem_classes=["lora-train-fields", "lora-train-preset-row"]):
                preset = unsaved(gr.Dropdown(
                    label=DECLARATIONS["preset"].label, choices=[NO_PRESET, *(p.name for p in presets())], value=NO_PRESET,
                    interactive=True, min_width=120, elem_id=element_id("preset")))
                preset.webui_tooltip = DECLARATIONS["preset"].help
                about_preset = gr.HTML("", elem_id="lora_train_preset_about")
            # Drawn by the script: what is done with presets and with files of settings.
            gr.HTML('<div id="lora_train_files"></div>')
    # An area that has no title yet is called by its name.
    for area, title in (FOLDS | {area: area.capitalize() for area in AREAS if area not in FOLDS}).items():
        folded = [d for d in declarations(AREAS[area]) if d.name not in (*fields, "preset")]
        if folded:
            with gr.Accordion(title, open=False, elem_id=f"lora_train_fold_{area}", elem_classes=["lora-train-fold"]):
                if area == "optimizer":
                    curve = gr.HTML("", elem_id="lora_train_schedule")
                _folded_rows(folded, fields, first)
                if area == "dataset":
                    folders = unsaved(gr.Button("List the folders", elem_id="lora_train_list_folders", size="sm",
                                                min_width=120))
    return preset, about_preset, curve, folders


def _folded_rows(folded: Iterable[Declaration], fields: dict[str, Any], first: Mapping[str, Value]) -> None:
    """Numbers and choices side by side, sliders side by side, a row for each text, switches at the end."""
    texts = [d for d in folded if d.type is str and not d.choices]
    switches = [d for d in folded if d.type is bool]
    sliders = [d for d in folded if d not in switches and slides(d)]
    others = [d for d in folded if d not in texts and d not in switches and d not in sliders]
    for entries in (others, sliders, *([text] for text in texts), switches):
        if entries:
            wide = ["lora-train-wide"] if entries in (sliders, switches) else []
            with gr.Row(elem_classes=["lora-train-fields", "lora-train-grid", *wide]):
                for declaration in entries:
                    fields[declaration.name] = field(declaration, first[declaration.name])


def _run_column() -> tuple[Any, Any, Any, Any, Any]:
    """The summary, the buttons, and the elements that the script draws into, with the result's buttons between them."""
    summary = gr.HTML("", elem_id="lora_train_summary")
    with gr.Row(elem_id="lora_train_buttons"):
        start = unsaved(gr.Button("Train", variant="primary", elem_id="lora_train_start", min_width=70, scale=3))
        # These are pressed in the script, which asks before something is lost.
        unsaved(gr.Button("Sample now", elem_id="lora_train_sample", min_width=114, scale=2, interactive=False))
        unsaved(gr.Button("Save now", elem_id="lora_train_save_now", min_width=94, scale=2, interactive=False))
        unsaved(gr.Button("Pause", elem_id="lora_train_pause", min_width=62, scale=1, interactive=False))
        unsaved(gr.Button("Stop and save", elem_id="lora_train_stop_save", min_width=134, scale=2, interactive=False))
        unsaved(gr.Button("Stop", elem_id="lora_train_stop", min_width=50, scale=1, interactive=False))
    with gr.Row(elem_id="lora_train_before"):
        # What it suggests is drawn by the script.
        unsaved(gr.Button("Suggest settings", elem_id="lora_train_suggest", size="sm", min_width=120))
        find_rate = unsaved(gr.Button("Find learning rate", elem_id="lora_train_find_rate", size="sm", min_width=130))
    gr.HTML('<div id="lora_train_suggestions"></div>')
    answer = gr.HTML("", elem_id="lora_train_answer")
    overwrite = unsaved(gr.Button("Overwrite it", elem_id="lora_train_overwrite_it", visible=False))
    gr.HTML('<div id="lora_train_live"></div>')
    with gr.Row(elem_id="lora_train_result_buttons", elem_classes=[_HIDDEN]):
        unsaved(gr.Button("Send to txt2img", elem_id="lora_train_send", min_width=120))
        unsaved(gr.Button("Copy LoRA text", elem_id="lora_train_copy", min_width=120))
        unsaved(gr.Button("See results", elem_id="lora_train_see_results", min_width=120))
    gr.HTML('<div id="lora_train_drawn"></div>')
    gr.HTML('<div id="lora_train_queue"></div>')
    with gr.Row(elem_id="lora_train_help"):
        unsaved(gr.Button("Report a problem", elem_id="lora_train_report", size="sm", min_width=120))
    return summary, start, find_rate, answer, overwrite


def _page_data() -> str:
    """What the script needs to know: the tooltips by element."""
    tooltips = {element_id(d.name): d.help for d in DECLARATIONS.values()}
    tooltips |= {
        "lora_train_start": "Start the training (Ctrl+Enter).",
        "lora_train_suggest": "Look at the pictures and captions, and propose settings with the reason for each.",
        "lora_train_find_rate": "Train a hundred steps with Prodigy, which finds a learning rate for these pictures and "
                                "settings. Nothing is saved.",
        "lora_train_sample": "Paint pictures with what was learnt so far, after the step under way.",
        "lora_train_list_folders": "Write a text for Folder settings with every folder of pictures in the dataset folder, to "
                                   "be changed.",
        "lora_train_pause": "Stand still after the step under way, until it is pressed once more. Generations go through.",
        "lora_train_save_now": "Save the LoRA as it is after the step under way, and go on.",
        "lora_train_stop_save": "End within a step and keep what was learnt.",
        "lora_train_stop": "End within a step and keep nothing but files that were saved on the way.",
        "lora_train_overwrite_it": "Train now and replace the file of that name when it is done.",
        "lora_train_report": "Download a zip for whoever helps: versions, settings, what happened, the log. Folders and the "
                             "names of users and computers are taken out.",
        "lora_train_send": "Put the trigger word and the LoRA into the prompt of txt2img, at the size it was trained at.",
    }
    placeholders = {element_id(d.name): d.zero for d in DECLARATIONS.values() if d.zero}
    return json.dumps({"tooltips": tooltips, "placeholders": placeholders})
