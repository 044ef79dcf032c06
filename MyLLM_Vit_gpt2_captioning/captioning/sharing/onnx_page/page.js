// The page around the captioner: a photo is chosen or dropped, and its caption appears.

import { Captioner } from "./captioner.js";

const [drop, input, photo, caption, note] = ["drop", "input", "photo", "caption", "note"].map((id) =>
  document.getElementById(id),
);
const loading = Captioner.load();
let newest = 0; // photos so far: an answer to an earlier one is not shown

loading.then(
  () => newest || show("", "Ready."),
  (error) => show("", `The captioner could not be loaded: ${error.message}`),
);

function show(words, remark) {
  caption.textContent = words;
  note.textContent = remark;
}

async function use(file) {
  const mine = ++newest;
  URL.revokeObjectURL(photo.src);
  photo.src = URL.createObjectURL(file);
  photo.hidden = false;
  show("", "Looking at it ...");
  try {
    const captioner = await loading;
    await new Promise((drawn) => setTimeout(drawn, 20)); // the page is drawn before the work begins
    const start = performance.now();
    const words = await captioner.caption(file);
    const milliseconds = Math.round(performance.now() - start);
    if (mine === newest) show(words || "(an empty caption)", `Written in ${milliseconds.toLocaleString("en")} ms.`);
  } catch (error) {
    if (mine === newest) {
      photo.hidden = true;
      show("", `${file.name}: ${error.message}`);
    }
  }
}

input.addEventListener("change", () => input.files.length && use(input.files[0]));
document.addEventListener("dragover", (event) => {
  event.preventDefault();
  drop.classList.add("over");
});
document.addEventListener("dragleave", () => drop.classList.remove("over"));
document.addEventListener("drop", (event) => {
  event.preventDefault();
  drop.classList.remove("over");
  if (event.dataTransfer.files.length) use(event.dataTransfer.files[0]);
});
