/** The page: which label space is open (the address says it), and what its buttons do. */
import { Ask } from './answer.js'
import { call, keys, server } from './api.js'
import { Classes } from './classes.js'
import { $, announce, ask, confirmed, counted, el, toast } from './dom.js'
import { chooser } from './photos.js'
import { Space } from './space.js'

/** @type {Space | null} */
let space = null
/** @type {any} */
let model = null

const classes = new Classes()
const asking = new Ask((photo) => classes.look(photo), (answered, revision) => {
  if (model && answered.bundle !== model.bundle) {
    toast(`The model has changed: ${answered.name} ${answered.version} answers now.`)
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
    if (id) {
      const opened = await new Space(id).load()
      if (id !== location.hash.slice(1)) return
      space = opened
      space.addEventListener('changed', (event) => changed(/** @type {CustomEvent} */ (event).detail))
      view('space')
      classes.open(space)
      asking.open(space)
      changed('')
      begin('new-class-name')
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
  $('classes-title').textContent = space.classes.length ? `${counted(space.classes.length, 'class', 'classes')}` : 'Classes'
  $('steps').hidden = space.classes.length > 0
  classes.draw()
  drawStrictness(space.facts.accepted, space.facts.false_accepts)
  drawModel()
  asking.again(because)
}

async function listSpaces() {
  const known = await Space.all()
  $('known-spaces').hidden = !known.length
  $('all-spaces').replaceChildren(...known.slice(0, 60).map(({ id, name, classes, photos }) =>
    el('li', {}, el('a', { href: `#${id}` }, el('b', {}, name), el('span', { class: 'hint' },
      `${counted(classes, 'class', 'classes')}, ${counted(photos, 'photo')}`)))))
}

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

chooser($('import-space'), async ([file]) => {
  try {
    const { id, name } = await Space.import(file)
    toast(`${name} imported.`)
    location.hash = id
  } catch (error) {
    toast(/** @type {Error} */ (error).message)
  }
})
$('import-space').accept = '.zip,application/zip'

$('space-menu').addEventListener('toggle', async (/** @type {any} */ event) => {
  if (event.newState !== 'open') return
  const others = (await Space.all().catch(() => [])).filter(({ id }) => id !== space?.id).slice(0, 8)
  $('space-list').replaceChildren(...others.map(({ id, name }) => el('a', { class: 'item', href: `#${id}` }, name)))
})

$('rename-space').addEventListener('click', async () => {
  $('space-menu').hidePopover()
  $('naming-name').value = space?.name
  if ((await ask($('naming'))) === 'yes') await space?.rename($('naming-name').value.trim()).catch((error) => toast(error.message))
})

$('export-space').addEventListener('click', async () => {
  $('space-menu').hidePopover()
  try {
    const url = URL.createObjectURL(await /** @type {Space} */ (space).export())
    el('a', { href: url, download: `${space?.name}.zip` }).click()
    setTimeout(() => URL.revokeObjectURL(url), 60_000)
  } catch (error) {
    toast(/** @type {Error} */ (error).message)
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
  }, (error) => toast(error.message))
})

// --- Undo and history

$('undo').addEventListener('click', async () => {
  try {
    const done = await space?.undo()
    toast(!done ? 'There is nothing to undo.' : done.same ? KEPT : `Undone.${lost(done.gone)}`)
  } catch (error) {
    toast(/** @type {Error} */ (error).message)
  }
})

const KEPT = 'The last step changed no class and no strictness. A label space keeps its name: rename it back.'

/** @param {any[] | undefined} gone */
const lost = (gone) => (gone?.length ? ` ${counted(gone.length, 'deleted item')} could not come back.` : '')

$('history').addEventListener('click', async () => {
  try {
    const revisions = await /** @type {Space} */ (space).revisions()
    $('past-list').replaceChildren(...revisions.map((revision, i) => el('li', {},
      el('span', { class: 'number' }, `${revision.number}`),
      el('span', { class: 'what' }, `${ACTIONS[revision.action] ?? revision.action} ${revision.what}`, el('small', { class: 'hint' }, [when(revision.created), revision.who].filter(Boolean).join(', '))),
      i === 0 ? el('span', { class: 'hint' }, 'now') : el('button', { class: 'small', value: `${revision.number}`,
        'aria-label': `Go back to revision ${revision.number}` }, 'Go back'))))
    const to = Number(await ask($('past')))
    if (!to) return
    const { gone } = await /** @type {Space} */ (space).rollback(to)
    toast(`As it was at revision ${to}.${lost(gone)}`)
  } catch (error) {
    toast(/** @type {Error} */ (error).message)
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
  const of100 = (/** @type {number} */ share) => `${Math.round(1000 * share) / 10} of 100`
  if (accepted !== null && !turning) strict.value = (100 - 100 * accepted).toFixed(1)
  const words = accepted === null ? 'For these classes the model has no measured threshold.'
    : `Takes ${of100(accepted)} photos that do show one of your classes` +
      (letIn === null ? '.' : `, and ${of100(letIn)} that show none, as measured on validation classes.`)
  strict.setAttribute('aria-valuetext', words)
  $('strict-words').textContent = `${words} Stricter turns more strangers away, and more of your own.`
}

strict.addEventListener('input', () => {
  const accept = Math.round(1000 - 10 * strict.value) / 1000
  clearTimeout(turning)
  turning = setTimeout(async () => {
    turning = 0
    await space?.setAccept(accept).catch((error) => toast(error.message))
  }, 250)
  drawStrictness(accept)
})

$('strict-default').addEventListener('click', async () => {
  clearTimeout(turning)
  turning = 0
  await space?.setAccept(null).catch((error) => toast(error.message))
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
  $('model').textContent = model ? `Answers come from ${model.name}, version ${model.version}.${figures}${
    model.degraded ? ` It may not be the newest: ${model.degraded}.` : ''}` : ''
}

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
  $('usage-all').hidden = Boolean(key) // a link takes no key along
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
