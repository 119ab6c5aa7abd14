"""Every example workflow in the real frontend, in both of its looks: loaded, compared with its file, and run in few steps.

Not part of the plain tests, as it needs a Chromium: `python dev.py test --browser`, or alone with `tests/browser --browser`.
Screenshots to look at are left in .dev/browser.
"""
import contextlib
import itertools
import json
import sys
import urllib.error
import urllib.request
from pathlib import Path
from urllib.parse import quote

import pytest

import dev

sys.path.append(str(Path(__file__).parent))

import chromium
from comfyui_ledits.tools.api import workflow as workflows

WORKFLOWS = sorted((dev.ROOT / "example_workflows").glob("*.json"))
BLUEPRINTS = sorted((dev.ROOT / "subgraphs").glob("*.json"))
LOOKS = ("canvas", "nodes 2.0")
SHOTS = dev.DEV / "browser"
CHECKPOINTS = {"CheckpointLoaderSimple", "UNETLoader", "CLIPLoader", "DualCLIPLoader", "VAELoader", "LoraLoader",
               "ControlNetLoader", "LoadVideo"}  # their files are the user's
SHORT = {"steps": 4, "inner_steps": 1, "first_steps": 1, "skip": 0}  # for the test of running

WINDOWS = ((1366, 768), (1440, 900), (1600, 900), (1920, 1080))
# Nodes with their title bar, folded ones with that alone, as the frontend drew them: [title, type, x, y, right, bottom]
BOXES = """app.graph.nodes.map(n => [n.title, n.type, n.boundingRect[0], n.boundingRect[1],
                                     n.boundingRect[0] + n.boundingRect[2], n.boundingRect[1] + n.boundingRect[3]])"""
CUT_OFF = """app.graph.nodes.filter(n => n.type === 'MarkdownNote').filter(n => {
    const text = n.widgets[0].element.querySelector('.tiptap'); return text.scrollHeight > text.clientHeight + 1;
}).map(n => n.title)"""
SAVING = next(path for path in WORKFLOWS if path.stem.startswith("09 "))

# The words that web/js/ledits.js shows, and ComfyUI's own of a node at work: [type, words]
WORDS = """app.graph.nodes.flatMap(n => (n.widgets ?? []).filter(w => w.name === 'ledits_words'
    && w.element.isConnected && w.element.offsetHeight).map(w => [n.type, w.element.innerText]))"""
PROGRESS = """app.graph.nodes.filter(n => n.type.startsWith('LEDITS_'))
    .flatMap(n => (n.widgets ?? []).filter(w => w.type === 'progressText').map(w => [n.type, w.value]))"""
# The number of lines that each part of the words of Save Inversion takes; its element's children are the parts
LINES = """[...app.graph.nodes.find(n => n.type === 'LEDITS_SaveInversion').widgets.find(w => w.name === 'ledits_words')
    .element.firstChild.childNodes].filter(part => part.data).map(part => {
        const range = document.createRange(); range.selectNodeContents(part);
        return new Set([...range.getClientRects()].filter(box => box.width).map(box => box.top)).size; })"""
SEED = "app.graph.nodes.find(n => n.type === 'LEDITS_EditFriendlyInversion').widgets.find(w => w.name === 'seed').value = "
NARROW = "app.graph.nodes.filter(n => n.type === 'LEDITS_SaveInversion').forEach(n => n.setSize([190, n.size[1]]))"
VALUES = """app.graph.serialize().nodes.map(n => [n.id, n.widgets_values ?? []])"""
UNKNOWN = "app.graph.nodes.filter(n => !LiteGraph.registered_node_types[n.type]).map(n => n.type)"


@pytest.fixture(scope="session")
def url(server_url):
    """The server, with ComfyUI's own example picture in its input folder."""
    if not dev.chromium():
        pytest.fail("These tests need a Chromium: run them with `python dev.py test --browser`.")
    stock = Path(sys.modules["comfy"].__path__[0]).parent / "input" / "example.png"
    upload(server_url, stock)
    return server_url


@pytest.fixture(scope="session")
def browsers():
    """Where the browser of the present look is kept open."""
    SHOTS.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        stack.page = None
        yield stack


@pytest.fixture(scope="session", params=itertools.product(LOOKS, WORKFLOWS), ids=lambda pair: f"{pair[1].stem}, {pair[0]}")
def page(request, browsers, url):
    """A page that shows the workflow `page.file` in the look `page.look`, loaded as the template browser does it."""
    look, file = request.param
    if browsers.page is None or browsers.page.look != look:
        browsers.close()
        settings = {"Comfy.VueNodes.Enabled": look == "nodes 2.0",
                    "Comfy.TutorialCompleted": True}  # a first visit opens the template browser
        post(url + "/settings", json.dumps(settings).encode())
        # a browser of its own, as the frontend opens the tabs of the last visit
        browsers.page = browsers.enter_context(chromium.Page())
        browsers.page.look = look
        browsers.page.open(url)
    page = browsers.page
    page.file = file
    forget(url)
    load(page)
    page.screenshot(SHOTS / f"{file.stem}, {look}.png")
    return page


@pytest.fixture
def workflow(page):
    """The file's contents."""
    return json.loads(page.file.read_text("utf-8"))


def post(url, body, kind="application/json"):
    urllib.request.urlopen(urllib.request.Request(url, body, {"Content-Type": kind})).close()


def upload(url, picture):
    head = f'--part\r\nContent-Disposition: form-data; name="image"; filename="{picture.name}"\r\n\r\n'
    post(url + "/upload/image", head.encode() + picture.read_bytes() + b"\r\n--part--\r\n",
         "multipart/form-data; boundary=part")


def test_the_template_browser_lists_them_with_thumbnails(url):
    with urllib.request.urlopen(url + "/api/workflow_templates") as answer:
        assert sorted(json.load(answer)[dev.PACK]) == [path.stem for path in WORKFLOWS]
    for path in WORKFLOWS:
        urllib.request.urlopen(f"{url}/api/workflow_templates/{dev.PACK}/{quote(path.stem)}.jpg").close()


def test_nothing_is_lost_in_loading(page, workflow):
    assert page.run(UNKNOWN) == []
    shown = page.run("app.graph.serialize()")
    for key in ("type", "title", "mode", "widgets_values"):
        assert {n["id"]: n.get(key) for n in shown["nodes"]} == {n["id"]: n.get(key) for n in workflow["nodes"]}
    ends = [{tuple(link[1:]) for link in graph["links"]} for graph in (shown, workflow)]
    assert ends[0] == ends[1]
    assert page.errors == []


def test_the_layout_can_be_read(page, workflow):
    boxes = page.run(BOXES)
    assert overlaps(boxes) == []
    assert page.look != "canvas" or page.run(CUT_OFF) == []
    groups = [(x, y, x + w, y + h) for x, y, w, h in (group["bounding"] for group in workflow["groups"])]
    lost = [title for title, kind, x, y, right, bottom in boxes if kind != "MarkdownNote"
            and not any(g[0] <= x and g[1] <= y and right <= g[2] and bottom <= g[3] for g in groups)]
    assert lost == []


def test_the_words_are_drawn_in_windows_of_many_sizes(page):
    """Below a zoom of its own choice the frontend draws none."""
    try:
        for size in WINDOWS:
            page.resize(size)
            page.wait(f"app.canvas.canvas.width === {size[0]}", 20)
            load(page, 300)
            assert page.run("app.canvas.draw(true, true), [app.canvas.low_quality, app.canvas.ds.scale >= 8 / 14]") == [False, True]
            if size == WINDOWS[0]:
                page.screenshot(SHOTS / f"{page.file.stem}, {page.look}, laptop.png")
    finally:
        page.resize(page.size)


def test_it_runs_and_the_pictures_arrive(page, workflow, url):
    prompt = page.run("app.graphToPrompt().then(made => made.output)")
    if CHECKPOINTS & {node["type"] for node in workflow["nodes"]}:
        problems = node_errors(url, prompt)  # all that is missing is the checkpoint, and what was to be made with it
        assert {problem["class_type"] for problem in problems.values()} <= CHECKPOINTS | {"LEDITS_LoadInversion"}
        return
    run(page)
    for node in (n for n in workflow["nodes"] if n["type"] in ("SaveImage", "PreviewImage")):
        page.wait(f"""(async () => {{
            const [file] = app.nodeOutputs[{node["id"]}]?.images ?? [];
            if (!file) return 0;
            const image = new Image(); image.src = '/api/view?' + new URLSearchParams(file); await image.decode();
            return image.naturalWidth;
        }})()""", 20)
    page.run("new Promise(drawn => setTimeout(drawn, 1000))")
    page.screenshot(SHOTS / f"{page.file.stem}, {page.look}, done.png")
    assert overlaps(page.run(BOXES)) == []  # nodes have grown by their words and pictures


@pytest.mark.parametrize("page", [(look, WORKFLOWS[0]) for look in LOOKS], ids=LOOKS, indirect=True)
def test_the_help_page_of_a_node_opens_with_its_picture(page):
    page.run("app.canvas.selectNode(app.graph.nodes.find(n => n.type === 'LEDITS_SemanticConcept'))")
    button = """document.querySelector('[data-testid="info-button"]')"""
    page.wait(f"!!{button}", 20)
    page.run(f"{button}.click()")
    picture = "[...document.querySelectorAll('img')].find(i => i.src.includes('/docs/images/'))"
    assert page.wait(f"{picture}?.naturalWidth", 20) == 512
    page.screenshot(SHOTS / f"help, {page.look}.png")


@pytest.mark.parametrize("page", [(look, WORKFLOWS[0]) for look in LOOKS], ids=LOOKS, indirect=True)
@pytest.mark.parametrize("blueprint", BLUEPRINTS, ids=lambda path: path.stem)
def test_blueprints_open_with_their_values(page, blueprint, url):
    """A blueprint on the canvas: one node with the widgets it promises, which reach the nodes inside."""
    made = json.loads(blueprint.read_text("utf-8"))
    page.run(f"app.loadGraphData({json.dumps(made)}, true, true, null).then(() => new Promise(drawn => setTimeout(drawn, 1500)))")
    assert page.run(UNKNOWN) == []
    slots = made["nodes"][0]["inputs"]
    names = [slot["name"] for slot in slots if "widget" in slot]
    assert page.run("app.graph.nodes[0].inputs.map(i => i.name)") == [slot["name"] for slot in slots]
    assert page.run("app.graph.nodes[0].widgets.map(w => w.name)") == names
    with urllib.request.urlopen(url + "/object_info") as answer:
        expected = workflows.to_prompt(made, json.load(answer))
    prompt = page.run("app.graphToPrompt().then(made => made.output)")
    assert {key: node["inputs"] for key, node in prompt.items()} == {key: node["inputs"] for key, node in expected.items()}
    # what is typed into the node arrives inside
    page.run("app.graph.nodes[0].widgets[0].value = 'typed'")
    assert "typed" in json.dumps(page.run("app.graphToPrompt().then(made => made.output)"))
    page.run("app.extensionManager.command.execute('Comfy.Canvas.FitView').then(() => new Promise(d => setTimeout(d, 1000)))")
    page.screenshot(SHOTS / f"{blueprint.stem}, {page.look}.png")


@pytest.mark.parametrize("page", [(look, SAVING) for look in LOOKS], ids=LOOKS, indirect=True)
def test_words_stay_on_the_nodes_after_the_job_and_after_a_reload(page, workflow, url):
    forget(url)
    page.open(url)  # it remembers jobs itself
    load(page)
    assert page.run(WORDS) == []
    page.run(NARROW)
    shorten(page)
    page.run(SEED + str(1 + LOOKS.index(page.look)))  # not of a job before: what is cached has no words in the history
    kept = page.run(VALUES)
    run(page)
    page.wait(f"{WORDS}.length === 3", 20)
    shown = dict(page.run(WORDS))
    assert shown["LEDITS_EditFriendlyInversion"] == "done: 4 steps, 4 network evaluations"
    folder, file, size = shown["LEDITS_SaveInversion"].split("\n")
    assert folder == "saved in ComfyUI's output folder:" and size.endswith(" kB, float32")
    assert file.startswith("inversions/red_star_0000") and file.endswith("_.ledits.safetensors")
    assert "model: BaseModel" in shown["LEDITS_InspectInversion"]
    assert page.run(PROGRESS) == []
    page.run("new Promise(drawn => setTimeout(drawn, 2000))")  # the frontend writes its draft now and then
    page.screenshot(SHOTS / f"words, {page.look}.png")
    lines = page.run(LINES)
    assert len(lines) > 5 and max(lines) == 1  # no word is cut, nor a file's name within a word
    assert page.run(VALUES) == kept  # the words are in no saved workflow, and in no prompt
    assert "ledits_words" not in json.dumps(page.run("app.graphToPrompt()"))

    page.open(url)
    page.wait(f"{WORDS}.length === 3", 20)
    assert dict(page.run(WORDS)) == shown and page.run(VALUES) == kept
    page.screenshot(SHOTS / f"words, {page.look}, reloaded.png")

    other = json.loads(WORKFLOWS[0].read_text("utf-8"))
    numbers = {node["id"] for node in other["nodes"] if node["type"].startswith("LEDITS_")}
    assert numbers & {node["id"] for node in workflow["nodes"]}
    page.run(f"app.loadGraphData({json.dumps(other)}, true, true, null).then(() => new Promise(d => setTimeout(d, 1500)))")
    assert page.run(WORDS) == []  # they are not of this workflow
    assert page.errors == []


@pytest.mark.parametrize("page", [(look, WORKFLOWS[0]) for look in LOOKS], ids=LOOKS, indirect=True)
def test_the_sentence_of_a_refusal_is_shown_until_the_next_job(page, url):
    """On the node; and for a node in a blueprint in a message."""
    concept = "app.graph.nodes.find(n => n.type === 'LEDITS_SemanticConcept').widgets.find(w => w.name === 'prompt')"
    said = f"{WORDS}.filter(([type]) => type === 'LEDITS_SemanticConcept').map(([, text]) => text)"
    kept = page.run(f"{concept}.value")
    page.run(f"{concept}.value = ''")
    refused(page)
    assert page.wait(f"{said}.length && {said}", 20)[0].startswith("The concept is empty: write")
    page.screenshot(SHOTS / f"refused, {page.look}.png")
    page.run(f"{concept}.value = {json.dumps(kept)}")
    run(page)
    page.wait(f"{said}.length === 0", 20)

    blueprint = next(path for path in BLUEPRINTS if path.stem.startswith("Edit a Picture"))
    page.run(f"app.loadGraphData({blueprint.read_text('utf-8')}, true, true, null).then(() => new Promise(d => setTimeout(d, 1500)))")
    page.run("""(() => {
        const [edit] = app.graph.nodes;
        const [model, picture, shown] = ['LEDITS_LoadDemoModel', 'LEDITS_LoadDemoPicture', 'PreviewImage'].map(type => {
            const node = LiteGraph.createNode(type); app.graph.add(node); return node; });
        for (const k of [0, 1, 2]) model.connect(k, edit, k);
        picture.connect(0, edit, 3);
        edit.connect(0, shown, 0);
        for (const w of edit.widgets) if (['source', 'target'].includes(w.name)) w.value = 'a red star';
    })()""")
    refused(page)
    page.wait("document.body.innerText.includes('source and target prompt have the same words')", 20)
    assert page.errors == []


def refused(page):
    page.run("delete app.__ended; app.api.addEventListener('execution_error', e => app.__ended = e.detail, {once: true});"
             " app.queuePrompt(0).then(() => 0)")
    page.wait("app.__ended", 120)


def overlaps(boxes):
    """The titles of nodes that cover each other."""
    return [(a[0], b[0]) for a, b in itertools.combinations(boxes, 2)
            if a[2] < b[4] and b[2] < a[4] and a[3] < b[5] and b[3] < a[5]]


def forget(url):
    """Clear the history, and with it the words of earlier jobs."""
    post(url + "/history", b'{"clear": true}')


def load(page, wait=1500):
    """Load the page's workflow as the template browser does it, and give it `wait` milliseconds to be drawn."""
    page.run(f"""fetch('/api/workflow_templates/{dev.PACK}/' + encodeURIComponent({json.dumps(page.file.name)}))
                 .then(answer => answer.json())
                 .then(graph => app.loadGraphData(graph, true, true, null, {{openSource: 'template'}}))
                 .then(() => new Promise(drawn => setTimeout(drawn, {wait})))""")


def shorten(page):
    """Few steps."""
    page.run(f"""((short) => app.graph.nodes.forEach(n => n.widgets?.forEach(w => {{
        if (w.name in short) w.value = short[w.name]; }})))({json.dumps(SHORT)})""")


def run(page):
    """Run the workflow that the page shows, in few steps, to its end."""
    shorten(page)
    page.run("delete app.__ended; for (const end of ['execution_success', 'execution_error'])"
             " app.api.addEventListener(end, e => app.__ended = {end, ...e.detail}, {once: true}); app.queuePrompt(0).then(() => 0)")
    ended = page.wait("app.__ended", 300)
    assert ended["end"] == "execution_success", ended.get("exception_message")


def node_errors(url, prompt):
    try:
        post(url + "/prompt", json.dumps({"prompt": prompt}).encode())
    except urllib.error.HTTPError as error:
        return json.load(error)["node_errors"]
    return {}
