"""What the page's browser is given besides gradio's own: style, and the pointer of the painter."""

CSS = """
.pmae-head h1 { margin: 0 0 4px; font-size: 1.5rem; }
.pmae-head p, .pmae-head h2 { margin: 0; }
.pmae-head h2 { font-size: 1.1rem; }
.pmae-figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(172px, 1fr)); gap: 16px; }
@media (max-width: 640px) { .pmae-figures { grid-template-columns: repeat(auto-fit, minmax(132px, 1fr)); } }
.pmae-figures figure { margin: 0; min-width: 0; max-width: 280px; }
.pmae-figures img { width: 100%; aspect-ratio: 1; object-fit: cover; display: block; border-radius: 6px;
  background: var(--border-color-primary); }
.pmae-figures img.sharp { image-rendering: pixelated; border-radius: 0; object-fit: contain; }
.pmae-figures figcaption { font-size: 0.85rem; line-height: 1.35; margin-top: 6px; overflow-wrap: anywhere; }
.pmae-figures figcaption b { display: block; }
.pmae-note { font-size: 0.85rem; line-height: 1.5; max-width: 84ch; margin: 14px 0 0; opacity: 0.8; }
.pmae-samples { display: grid; align-items: start; grid-template-columns: repeat(4, minmax(0, 1fr)); gap: 8px; }
.pmae-samples button { padding: 0; border: 0; background: none; cursor: pointer; font-size: 0.72rem;
  font-weight: 400; min-width: 0; }
.pmae-samples img { width: 100%; display: block; border-radius: 6px; }
.pmae-samples span { display: block; overflow: hidden; text-overflow: ellipsis; white-space: nowrap; margin-top: 2px; }
.pmae-samples button:hover img, .pmae-samples button:focus-visible img { outline: 3px solid #2458c5; }
.pmae-message { margin: 0; padding: 8px 12px; border-radius: 6px; border-left: 4px solid; overflow-wrap: anywhere; }
.pmae-ok { border-color: #2458c5; background: color-mix(in srgb, #2458c5 10%, transparent); }
.pmae-error { border-color: #c2261c; background: color-mix(in srgb, #c2261c 12%, transparent); }
.pmae-painter { display: grid; width: 100%; max-width: 384px; aspect-ratio: 1; background-size: 100% 100%;
  image-rendering: pixelated; cursor: crosshair; touch-action: none; user-select: none; }
.pmae-painter i { border: 1px solid rgba(255, 255, 255, 0.28); }
.pmae-painter i.hidden { background: #7c746a; }
"""

PICK = """
element.addEventListener('click', (event) => {
  const button = event.target.closest('button[data-index]');
  if (button) trigger('select', { index: Number(button.dataset.index) });
});
"""

PAINT = """
let hide = null;
const cellAt = (event) => {
  const at = document.elementFromPoint(event.clientX, event.clientY);
  return at && element.contains(at) && at.closest('.pmae-painter i');
};
const finish = () => {
  if (hide === null) return;
  hide = null;
  const cells = [...element.querySelectorAll('.pmae-painter i')];
  trigger('input', { cells: cells.map((cell) => (cell.classList.contains('hidden') ? '1' : '0')).join('') });
};
element.addEventListener('pointerdown', (event) => {
  const cell = cellAt(event);
  if (!cell) return;
  event.preventDefault();
  hide = !cell.classList.contains('hidden');
  cell.classList.toggle('hidden', hide);
});
element.addEventListener('pointermove', (event) => {
  const cell = hide !== null && cellAt(event);
  if (cell) cell.classList.toggle('hidden', hide);
});
window.addEventListener('pointerup', finish);
window.addEventListener('pointercancel', finish);
"""
"""A stroke hides patches if it starts on a visible one and shows them if it starts on a hidden one."""
