"""The page: fields made from the settings, their layout, what its buttons do, and a server for it without a WebUI.

The only home of gradio (3.41.2, and nothing that gradio 4 does not have). What moves on the page while a run goes on,
the bar, the curve, the results, is drawn in the browser by `javascript/lora_train.js` from the API's status.
"""
