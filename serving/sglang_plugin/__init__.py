"""lightship inside SGLang: the W4AFP8 experts of a stock server, loaded with care and run by lightship's kernels.

SGLang finds the plugin by its entry point, `sglang.srt.plugins`, wherever lightship is installed, and runs
`entry.activate` in each of its processes. The modules, in the order in which they act: `settings` reads the
environment, `entry` hooks SGLang, `takeover` decides for each layer, `arrivals` watches what the loader brings,
`method` is the layer's new method, `activity` says what is served.

    pip install lightship && LIGHTSHIP_MOE=on sglang serve --model-path DIR --tp 8

This package runs in SGLang's environment, not in ours: it imports torch, SGLang and the standard library, nothing else.
"""
