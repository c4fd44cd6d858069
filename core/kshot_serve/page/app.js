/** The page: which label space is open (the address says it), and what its buttons do. */
import { Ask } from './answer.js'
import { call, keys, may, server } from './api.js'
import { Classes } from './classes.js'
import { $, announce, ask, confirmed, counted, el, has, toast } from './dom.js'
import { chosen, grouped, isExport, nameOf } from './folders.js'
import { droppable, serverLimits } from './photos.js'
import { Space } from './space.js'

/** @type {Space | null} */
let space = null
/** @type {any} */
let model = null

const classes = new Classes()
const asking = new Ask((photo) => classes.look(photo), (answered, revision) => {
  if (model && answered.bundle !== model.bundle) {
    toast(`The model has changed: ${versioned(answered)} answers now.`)
    showModel()
  }
  if (space && revision > space.revision) reload('a change made elsewhere')
})

/** Focus a field, but not where that would bring up a keyboard on the screen. @param {string} id */
const begin = (id) => matchMedia('(pointer: fine)').matches && $(id).focus({ preventScroll: true })

/** @param {string} view */
const view = (view) => (document.body.dataset.view = view)

/** @param {string} because */
async function reload(because) {
  if (!space) return
  await space.load()
  changed(because)
}

/** Show what the address asks for: a label space, or the choice of one. */
async function open() {
  const id = location.hash.slice(1)
  for (const menu of document.querySelectorAll('[popover]:popover-open')) /** @type {HTMLElement} */ (menu).hidePopover()
  try {
    await showScope()
    if (id) {
      const opened = await new Space(id).load()
      if (id !== location.hash.slice(1)) return
      space = opened
      space.addEventListener('changed', (event) => changed(/** @type {CustomEvent} */ (event).detail))
      space.addEventListener('growing', drawClasses)
      view('space')
      classes.open(space)
      asking.open(space)
      changed('')
      begin('new-class-name')
      if (waiting.length) classes.addAll(waiting.splice(0))
    } else {
      if (space) asking.stop()
      space = null
      document.title = 'kshot'
      view('start')
      begin('new-space-name')
      await listSpaces()
    }
    showModel()
  } catch (error) {
    const { code, message } = /** @type {any} */ (error)
    if (code === 'space_unknown') {
      history.replaceState(null, '', '#')
      await open()
      toast('That label space is not on this server.')
    } else banner(message)
  }
}

/** Draw the label space anew, and ask again about the last photo. @param {string} because */
function changed(because) {
  if (!space) return
  document.title = `${space.name} · kshot`
  $('space-name').textContent = space.name
  drawClasses()
  drawStrictness(space.facts.accepted, space.facts.false_accepts)
  drawModel()
  asking.again(because)
}

function drawClasses() {
  const count = space?.classes.length ?? 0
  $('classes-title').textContent = count ? counted(count, 'class', 'classes') : 'Classes'
  $('steps').hidden = count > 0
  $('strictness').hidden = !count
  classes.draw()
}

/** Which buttons there are depends on what the key may do. */
async function showScope() {
  document.body.dataset.scope = (await serverLimits()).scope
  $('strict').disabled = !may('write')
}
server.addEventListener('key', () => showScope().catch(() => {}))

/** Label spaces of this server, the newest first. @type {Awaited<ReturnType<typeof Space.all>>} */
let known = []

async function listSpaces() {
  known = await Space.all()
  $('known-spaces').hidden = !known.length
  $('find-space').value = ''
  $('find-space').hidden = known.length <= FEW
  drawSpaces()
}

const FEW = 12 // label spaces; where there are more, they can be searched
const MOST = 60 // that are listed

function drawSpaces() {
  const found = known.filter(({ name }) => has(name, $('find-space').value))
  $('all-spaces').replaceChildren(...found.slice(0, MOST).map(({ id, name, classes, photos }) =>
    el('li', {}, el('a', { href: `#${id}` }, el('b', {}, name), el('span', { class: 'hint' },
      `${counted(classes, 'class', 'classes')}, ${counted(photos, 'photo')}`)))))
  $('found-spaces').textContent = found.length > MOST ? `The newest ${MOST} of ${found.length}. Type a part of a name to find others.`
    : found.length ? '' : 'None has this in its name.'
}
$('find-space').addEventListener('input', drawSpaces)

// --- Label spaces: new, other, import, export, rename, delete

$('new-space').addEventListener('submit', async (/** @type {Event} */ event) => {
  event.preventDefault()
  try {
    const { id } = await Space.create($('new-space-name').value.trim())
    $('new-space').reset()
    $('new-space-problem').textContent = ''
    location.hash = id
  } catch (error) {
    $('new-space-problem').textContent = /** @type {Error} */ (error).message
  }
})

/** Classes for the label space that is about to open. @type {{name: string, files: File[]}[]} */
const waiting = []

/** A new label space from folders of photos. @param {import('./folders.js').Found[]} found @param {string} name */
async function bring(found, name) {
  if (space || !may('write')) return
  const { classes: wanted } = grouped(found)
  if (!wanted.length) throw new Error('Drop folders of photos, one for each class, or a zip of them.')
  for (let number = 1; ; number++) {
    try {
      const { id } = await Space.create(number > 1 ? `${name} (${number})` : name)
      waiting.push(...wanted)
      location.hash = id
      return
    } catch (error) {
      if (/** @type {any} */ (error).code !== 'conflict' || number > 50) throw error
    }
  }
}
const say = (/** @type {any} */ { message }) => toast(message)
droppable(document.querySelector('main'), (found, name) => bring(found, name).catch(say), toast)

$('import-space').addEventListener('change', async () => {
  const [file] = $('import-space').files
  $('import-space').value = ''
  try {
    if (!(await isExport(file))) return await bring(await chosen([file]), nameOf(file))
    const { id, name } = await Space.import(file)
    toast(`${name} imported.`)
    location.hash = id
  } catch (error) {
    say(error)
  }
})

$('space-menu').addEventListener('toggle', async (/** @type {any} */ event) => {
  if (event.newState !== 'open') return
  const others = (await Space.all().catch(() => [])).filter(({ id }) => id !== space?.id).slice(0, 8)
  $('space-list').replaceChildren(...others.map(({ id, name }) => el('a', { class: 'item', href: `#${id}` }, name)))
})

$('rename-space').addEventListener('click', async () => {
  $('space-menu').hidePopover()
  $('naming-name').value = space?.name
  if ((await ask($('naming'))) === 'yes') await space?.rename($('naming-name').value.trim()).catch(say)
})

$('export-space').addEventListener('click', async () => {
  $('space-menu').hidePopover()
  try {
    const url = URL.createObjectURL(await /** @type {Space} */ (space).export())
    el('a', { href: url, download: `${space?.name}.zip` }).click()
    setTimeout(() => URL.revokeObjectURL(url), 60_000)
  } catch (error) {
    say(error)
  }
})

$('delete-space').addEventListener('click', async () => {
  $('space-menu').hidePopover()
  const { name, photos } = /** @type {Space} */ (space)
  const text = `All its classes and its ${counted(photos, 'photo')} will be deleted for good. Export it first to keep a copy.`
  if (!(await confirmed(`Delete ${name}?`, text, 'Delete label space'))) return
  await space?.delete().then(() => {
    location.hash = ''
    toast(`${name} deleted.`)
  }, say)
})

// --- Undo and history

$('undo').addEventListener('click', async () => {
  try {
    const { what, gone } = await /** @type {Space} */ (space).undo()
    toast(UNDONE[what] + lost(gone))
  } catch (error) {
    say(error)
  }
})

const UNDONE = {
  nothing: 'There is nothing to undo.',
  deleted: 'Nothing to undo: what was deleted does not come back. Undo again for the step before it.',
  same: 'The last step changed no class and no strictness. A label space keeps its name: rename it back.',
  undone: 'Undone.',
}

/** @param {any[] | undefined} gone */
const lost = (gone) => (gone?.length ? ` ${counted(gone.length, 'deleted item')} could not come back.` : '')

$('history').addEventListener('click', async () => {
  try {
    const revisions = await /** @type {Space} */ (space).revisions()
    $('past-list').replaceChildren(...revisions.map((revision, i) => el('li', {},
      el('span', { class: 'number' }, `${revision.number}`),
      el('span', { class: 'what' }, `${ACTIONS[revision.action] ?? revision.action} ${revision.what}`, el('small', { class: 'hint' }, [when(revision.created), revision.who].filter(Boolean).join(', '))),
      i === 0 ? el('span', { class: 'hint' }, 'now') : el('button', { class: 'small', 'data-needs': 'write', value: `${revision.number}`,
        'aria-label': `Go back to revision ${revision.number}` }, 'Go back'))))
    const to = Number(await ask($('past')))
    if (!to) return
    const { gone } = await /** @type {Space} */ (space).rollback(to)
    toast(`As it was at revision ${to}.${lost(gone)}`)
  } catch (error) {
    say(error)
  }
})

/** What was done; the server's words say to what. @type {Record<string, string>} */
const ACTIONS = {
  create: 'Made', import: 'Imported', change: 'Name or strictness changed', add_class: 'New class:', add_photos: 'Added',
  rename_class: 'Renamed a class', delete_class: 'Deleted', delete_photo: 'Deleted', rollback: 'Back',
}

/** @param {string} time */
const when = (time) => new Date(time).toLocaleString(undefined, { dateStyle: 'short', timeStyle: 'short' })

// --- How strict

/** The slider shows the share of known photos that is turned away: to the right is strict. */
const strict = $('strict')
let turning = 0

/** What the threshold does, of 100 photos. @param {number | null} accepted known ones @param {number | null} [letIn] unknown ones */
function drawStrictness(accepted, letIn = null) {
  const share = (/** @type {number | null} */ of) => (of === null ? '…' : `${Math.round(1000 * of) / 10}\u00a0%`)
  if (accepted !== null && !turning) strict.value = (100 - 100 * accepted).toFixed(1)
  $('shares').hidden = accepted === null
  $('share-known').textContent = share(accepted)
  $('share-unknown').textContent = share(letIn)
  strict.setAttribute('aria-valuetext', accepted === null ? NO_THRESHOLD
    : `${share(accepted)} of known photos pass${letIn === null ? '' : `, ${share(letIn)} of unknown ones`}`)
  $('strict-words').textContent = accepted === null ? NO_THRESHOLD : 'Measured on other classes. Stricter lets fewer of both pass.'
}

const NO_THRESHOLD = 'For these classes the model has no measured threshold.'

strict.addEventListener('input', () => {
  const accept = Math.round(1000 - 10 * strict.value) / 1000
  clearTimeout(turning)
  turning = setTimeout(async () => {
    turning = 0
    await space?.setAccept(accept).catch(say)
  }, 250)
  drawStrictness(accept)
})

$('strict-default').addEventListener('click', async () => {
  clearTimeout(turning)
  turning = 0
  await space?.setAccept(null).catch(say)
  if (space) drawStrictness(space.facts.accepted, space.facts.false_accepts)
})

// --- The model

async function showModel() {
  model = await call('GET', '/v1/model').catch(() => null)
  drawModel()
}

/** What to expect of it, measured at the nearest size to this label space. */
function drawModel() {
  const ways = Math.max(2, space?.classes.length ?? 5)
  const shots = space?.classes.length ? space.photos / space.classes.length : 1
  /** @type {any[]} */
  const expected = [...(model?.expected ?? [])].sort((a, b) =>
    Math.abs(a.shots - shots) - Math.abs(b.shots - shots) || Math.abs(a.ways - ways) - Math.abs(b.ways - ways))
  const [best] = expected
  const figures = best
    ? ` On ${best.ways} classes that it had never seen, with ${counted(best.shots, 'photo')} of each, it was right ${
      (100 * best.accuracy).toFixed(1)} ± ${(100 * best.margin).toFixed(1)} % of the time.`
    : ' How often it is right has not been measured.'
  $('model').textContent = model ? `Answers come from ${versioned(model)}.${figures}${
    model.degraded ? ` It may not be the newest: ${model.degraded}.` : ''}` : ''
}

/** A bundle that is in no registry has version 0. @param {{name: string, version: string}} model */
const versioned = ({ name, version }) => (version === '0' ? name : `${name}, version ${version}`)

// --- Use in code

$('code').addEventListener('click', () => {
  const { id, name } = /** @type {Space} */ (space)
  const key = sessionStorage.getItem('kshot-key')
  $('usage-curl').textContent = `curl ${location.origin}/v1/spaces/${id}/classify \\\n  ${
    key ? '-H "Authorization: Bearer $KSHOT_KEY" \\\n  ' : ''}-F photos=@photo.jpg`
  $('usage-python').textContent = `${key ? 'import os\n\n' : ''}from kshot_client import Client

client = Client("${location.origin}"${key ? ', key=os.environ["KSHOT_KEY"]' : ''})
space = client.space(${JSON.stringify(name)})
answer = space.classify("photo.jpg")
print(answer.decision, answer.name, answer.probability)`
  $('usage').showModal()
})

for (const button of document.querySelectorAll('[data-copy]'))
  button.addEventListener('click', async () => {
    const text = $(/** @type {HTMLElement} */ (button).dataset.copy ?? '')
    let done = 'Copied'
    try {
      await navigator.clipboard.writeText(text.textContent)
    } catch { // browsers lend the clipboard only to pages on https or localhost
      getSelection()?.selectAllChildren(text)
      done = 'Selected'
    }
    announce(`${done}.`)
    button.textContent = done
    setTimeout(() => (button.textContent = 'Copy'), 2000)
  })

// --- How the server is

/** @param {string} text */
function banner(text) {
  $('banner').textContent = text
  $('banner').hidden = !text
}

keys.ask = async (refused) => {
  $('key-text').textContent = refused
    ? 'That key does not open this server. Paste another.'
    : 'Paste an API key. It is kept in this tab only, until the tab is closed.'
  $('key-value').value = ''
  return (await ask($('key'))) === 'yes' ? $('key-value').value.trim() : null
}
server.addEventListener('away', () => banner('The server does not answer. Looking for it again every few seconds…'))
server.addEventListener('back', () => {
  banner('')
  if (space?.id === location.hash.slice(1)) reload('').then(showModel, open)
  else open()
})
server.addEventListener('busy', (event) => {
  const { seconds } = /** @type {CustomEvent} */ (event).detail
  banner(`The server is busy. Trying again in ${counted(Math.ceil(seconds), 'second')}…`)
})
server.addEventListener('answered', () => $('banner').hidden || banner(''))

// --- The whole page: paste, stray drops, tabs on a phone

document.addEventListener('paste', (event) => {
  const files = [...(event.clipboardData?.files ?? [])]
  if (!files.length || !space || document.querySelector('dialog[open]')) return
  event.preventDefault()
  const take = classes.pasteTarget(document.activeElement)
  take ? take(files) : asking.show(files[0])
})
for (const what of ['dragover', 'drop']) document.addEventListener(what, (event) => event.preventDefault()) // never navigate

const tabs = /** @type {HTMLElement[]} */ ([...document.querySelectorAll('.tabs button')])
for (const tab of tabs)
  tab.addEventListener('click', () => {
    document.body.dataset.tab = tab.dataset.tab
    tabs.forEach((one) => (one === tab ? one.setAttribute('aria-current', 'true') : one.removeAttribute('aria-current')))
    scrollTo(0, 0)
  })

for (const button of document.querySelectorAll('[data-close]'))
  button.addEventListener('click', () => button.closest('dialog')?.close())

window.addEventListener('hashchange', open)
open()
