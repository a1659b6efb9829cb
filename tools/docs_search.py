"""What the search page shows besides titles: a line of context below each result, and for the questions that people
have the section that answers them first."""

import json
import re
from pathlib import Path

from bs4 import BeautifulSoup, SoupStrainer

# what people type, by the section of the page that answers it; words are compared without order and plural
TOPICS = {
    "guides/image_quality": {
        "Which wells are odd?": "outlier, odd well, quality control, qc, bad images, out of focus, empty well, "
        "blurred, saturated, artefact",
        "Leaving sites out": "exclude wells, leave out"},
    "guides/by_question": {
        "How are my images read?": "read images, load images, my images, describe",
        "Is there a batch effect, and how big?": "batch effect, size of the batch effect, day effect, plate effect",
        "Which treatments do something?": "active compound, active treatment, activity, effect of a treatment, "
        "compound, drug, phenotype",
        "Which treatments look alike?": "look alike, similar treatment, similar compound, similarity, cluster, "
        "mechanism of action, moa, nearest neighbour",
        "Can I trust this accuracy?": "trust accuracy, confidence interval, cross validation, significance, "
        "overfitting",
        "Show me the best hits": "best hit, hit, hit list, top well, most confident",
        "Cells or background, and which stain?": "cells or background, saliency, saliency map, grad cam, gradcam, "
        "attention, heat map, where the network looks, explain, occlusion, which stain",
        "How many replicates: experiments, sites, wells?": "replicate, how many replicates, how many sites, "
        "how many wells, learning curve, sample size, power, number of sites",
        "The next plate, from another folder": "new plate, next plate, later plate, another folder, apply, new data, "
        "predict new images, inference",
        "One GPU, two GPUs?": "gpu, two gpu, multi gpu, several gpu, cuda, device, distributed, memory",
        "Blend folds, or two models": "blend, blend folds, five folds, ensemble, average models, two models",
        "Another backbone: convnext_tiny": "backbone, convnext, convnext tiny, architecture, resnet, timm, "
        "vision transformer",
        "256 pixels": "256 pixels, image size, resolution",
        "Pseudo-labels": "pseudo label, pseudo labels, pseudolabel",
        "Resume after Ctrl-C": "resume, ctrl c, interrupt, checkpoint, stop training, continue training",
        "Eight views at prediction (TTA 8)": "tta, tta 8, test time augmentation, views",
        "Freeze, then unfreeze": "freeze, unfreeze, fine tune, transfer learning",
        "A learning rate: lr_find": "lr find, learning rate, lr finder, find lr",
        "Upload a kernel": "kernel, upload kernel, kaggle kernel, submit to kaggle, notebook for kaggle"},
    "guides/sizes": {"Which when": "crop, resize, read size, sizes"},
    "guides/glossary": {"The laboratory": "glossary, treatment, words, sirna, experiment, well, site"},
}
WHOLE = "guides/", "tutorials/", "index", "commands"  # pages of which all text can be context
LENGTH = 300  # characters of a section of the other pages


def sections(page):
    "Of a page: id, heading and text of each section and of each name that it defines, without the sections within"
    main = BeautifulSoup(page.read_text(encoding="utf-8"), "html.parser", parse_only=SoupStrainer("article"))
    for gone in main.select("script, style, img, table.dataframe, .headerlink, .prev-next-area"):
        gone.decompose()
    for code in main.select("pre, code"):
        code.string = code.get_text()  # without a space between its parts
    names = [[e["id"], "", " ".join(e.find_next("dd").get_text(" ").split())[:LENGTH]] for e in main.select("dt[id]")]
    found = []
    for section in reversed(main.find_all("section")):  # the inner ones first: they are taken out
        title = section.find(re.compile(r"h[1-6]"))
        heading = title.extract().get_text(" ", strip=True) if title else ""
        text = " ".join(section.extract().get_text(" ").split())
        found.append([section.get("id", ""), heading, re.sub(r" (?=[.,;:)])", "", text)])
    return found[::-1] + names


def topics(context):
    "Phrases with the page and section that they lead to. Raises: ValueError for a heading that a page does not have."
    found = []
    for page, headings in TOPICS.items():
        ids = {heading: i for i, heading, _ in context.get(page, [])}
        for heading, phrases in headings.items():
            if heading not in ids:
                raise ValueError(f"tools/docs_search.py: {page} has no section {heading!r}, only {', '.join(ids)}")
            found += [[phrase.strip(), page, ids[heading], heading] for phrase in [heading, *phrases.split(",")]]
    return found


def write_context(site):
    "Write `_static/search_context.js` of a built site"
    context = {}
    for path in sorted(Path(site).rglob("*.html")):
        name = path.relative_to(site).with_suffix("").as_posix()
        if name.startswith("_") or name in ("search", "genindex", "py-modindex"):
            continue
        keep = None if name.startswith(WHOLE) else LENGTH
        context[name] = [[i, heading, text[:keep]] for i, heading, text in sections(path)]
    data = json.dumps({"pages": context, "topics": topics(context)}, ensure_ascii=False, separators=(",", ":"))
    out = Path(site) / "_static" / "search_context.js"
    out.write_text(f"const SEARCH_CONTEXT = {data};\n", encoding="utf-8")
    return out
