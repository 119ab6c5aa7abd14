/**
 * The words of the last job, on the nodes of this pack: how many steps ran, where a file went, why it was refused.
 *
 * ComfyUI shows words while a node works; its newest frontends take them away when the job is over, all of them when the
 * page is loaded again. What a node said is in the server's history of jobs (nodes/feedback.py), beside the id of the
 * workflow that was run. So: when a job ends, its entry is fetched and shown; when a workflow is loaded, the entries
 * with its id. No words of a job that ran in another tab get onto a node with the same number.
 *
 * Of an error ComfyUI shows at first only that there was one. Its sentence says what to do, so that it is shown on the node
 * that refused until the next job of the workflow; of a node in a subgraph, which nobody sees, in a message as well.
 *
 * The widget is the node's last one and is not serialized: neither a saved workflow nor a prompt knows it.
 */
import { app } from "../../../scripts/app.js";

const WIDGET = "ledits_words";
const MARGIN = 6;
const LINE = 15;
const FONT = "11px Inter, Arial, sans-serif";
const JOBS = 64; // that are looked through for a workflow that was loaded

/** Workflow id -> Map of node (its path of ids, such as "3" or "12:5") -> {type, text, refused}. */
const known = new Map();

const pen = document.createElement("canvas").getContext("2d");

const root = () => app.rootGraph ?? app.graph;

/** The node at a path such as "12:5": node 5 in the subgraph of node 12. */
function nodeAt(path) {
  let graph = root();
  const ids = String(path).split(":");
  const last = ids.pop();
  for (const id of ids) graph = graph?.getNodeById(id)?.subgraph;
  return graph?.getNodeById(last);
}

/** What the nodes of this pack said in a job, of its entry in the history. */
function said(entry) {
  const found = new Map();
  for (const [path, output] of Object.entries(entry.outputs ?? {})) {
    const type = entry.prompt[2][path]?.class_type;
    const text = (output?.ledits_words ?? output?.text)?.join("\n");
    if (type?.startsWith("LEDITS_") && text) found.set(path, { type, text });
  }
  const [, error] = entry.status?.messages?.findLast(([event]) => event === "execution_error") ?? [];
  if (error?.node_type.startsWith("LEDITS_") && error.exception_message) {
    const text = error.exception_message.trim();
    found.set(String(error.node_id), { type: error.node_type, text, refused: true });
  }
  return found;
}

/** The words after a job: those before it, but for what was refused then, and its own. */
const merged = (before, job) => new Map([...[...before].filter(([, words]) => !words.refused), ...job]);

const workflowOf = (entry) => entry.prompt[3]?.extra_pnginfo?.workflow?.id;

async function history(route) {
  const answer = await app.api.fetchApi(`/history${route}`);
  return answer.ok ? answer.json() : {};
}

/** The entry of a job. A server tells that a job is over a moment before its history has it. */
async function entryOf(job) {
  for (let wait = 50; wait < 5000; wait *= 2) {
    const entry = (await history(`/${encodeURIComponent(job)}`))[job];
    if (entry) return entry;
    await new Promise((resume) => setTimeout(resume, wait));
  }
}

/** The last words of each node of a workflow. A job that found a node's result in the cache may not have its words. */
async function lastOf(workflow) {
  if (!known.has(workflow)) {
    const entries = Object.values(await history(`?max_items=${JOBS}`)).filter((made) => workflowOf(made) === workflow);
    const jobs = entries.sort((a, b) => a.prompt[0] - b.prompt[0]).map(said);
    // a job of this page may have ended meanwhile, and is newer
    if (known.has(workflow)) jobs.push(known.get(workflow));
    known.set(workflow, jobs.reduce(merged, new Map()));
  }
  return known.get(workflow);
}

/** The parts of a text between which a line may break: after spaces, and after / and _ in file names. */
const parts = (line) => line.split(/(?<=[\s/_])(?=[^\s/_])/);

/** The number of lines that a text takes, reckoned: the canvas wants the height before the page has laid out the element. */
function lines(text, width) {
  pen.font = FONT;
  let count = 0;
  for (const line of text.split("\n")) {
    let end = 0;
    count += 1;
    for (const part of parts(line)) {
      const size = pen.measureText(part.trimEnd()).width;
      if (end && end + size > width) [count, end] = [count + 1, 0];
      count += Math.max(0, Math.ceil(size / width) - 1); // a part that is longer than a line
      end += pen.measureText(part).width;
    }
  }
  return count;
}

function added(node) {
  const element = document.createElement("div");
  const inner = element.appendChild(document.createElement("div"));
  inner.style.cssText = `font: ${FONT}; line-height: ${LINE}px; color: var(--input-text, #ddd); white-space: pre-wrap;
    overflow-wrap: break-word; user-select: text;`;
  const height = () => 2 * MARGIN + LINE * lines(inner.textContent, node.size[0] - 2 * MARGIN);
  const widget = node.addDOMWidget(WIDGET, WIDGET, element, {
    serialize: false, // into prompts
    margin: MARGIN,
    getValue: () => inner.textContent,
    setValue: () => {},
    getMinHeight: height,
    getMaxHeight: height,
  });
  widget.serialize = false; // into workflows
  return widget;
}

function remove(node, chosen) {
  for (const widget of node.widgets?.filter(chosen) ?? []) node.removeWidget(widget);
}

function show(words) {
  for (const [path, { type, text }] of words) {
    const node = nodeAt(path);
    if (node?.comfyClass !== type) continue;
    remove(node, (widget) => widget.type === "progressText"); // ComfyUI's own, where it stays: it says the same
    const widget = node.widgets?.find((w) => w.name === WIDGET) ?? added(node);
    const broken = parts(text).flatMap((part) => [part, document.createElement("wbr")]);
    widget.element.firstChild.replaceChildren(...broken);
    // Nodes 2.0 grow by themselves
    if (!LiteGraph.vueNodesMode) node.setSize([node.size[0], Math.max(node.size[1], node.computeSize()[1])]);
    node.setDirtyCanvas?.(true, true);
  }
}

async function ended({ detail }) {
  const entry = await entryOf(detail.prompt_id);
  const workflow = entry && workflowOf(entry);
  if (!workflow) return;
  const before = known.get(workflow) ?? new Map();
  const job = said(entry);
  const words = merged(before, job);
  known.set(workflow, words);
  if (root().id !== workflow) return;
  for (const [path, { refused }] of before) {
    const node = refused && !words.has(path) && nodeAt(path);
    if (node) remove(node, (widget) => widget.name === WIDGET);
  }
  show(words);
  for (const [path, { text, refused }] of job)
    if (refused && path.includes(":"))
      app.extensionManager.toast.add({ severity: "error", summary: nodeAt(path.split(":")[0])?.title, detail: text, life: 20000 });
}

app.registerExtension({
  name: "LEDITS.Words",
  setup() {
    for (const end of ["execution_success", "execution_error", "execution_interrupted"])
      app.api.addEventListener(end, ended);
    // a node that works again has ComfyUI's words
    app.api.addEventListener("progress_text", ({ detail }) => {
      const node = nodeAt(detail.nodeId);
      if (node) remove(node, (widget) => widget.name === WIDGET);
    });
  },
  async afterConfigureGraph() {
    const workflow = root().id;
    const words = await lastOf(workflow);
    if (root().id === workflow) show(words);
  },
});
