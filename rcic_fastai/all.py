"What a notebook needs: `from rcic_fastai.all import *`. Every other public name is imported from its module."

from .screen.labels import label_matrix
from .screen.simulate import simulate_screen
from .screen.folds import fold_report
from .screen.groups import plate_groups, plate_rotations
from .screen.core import plate_map, Screen
from .screen.atlas import Atlas, atlas_folds, hpa_channels, hpa_classes, label_truth, read_hpa, read_labels
from .screen.describe import describe_screen
from .screen.read import read_screen
from .screen.simulate_atlas import simulate_hpa
from .screen.split import valid_mask

from .data.context import ContextBlock, ScreenContext
from .data.augment import (
    ChannelIntensity, Cutout, D4, ImageBrightness, PerspectiveWarp, RandomResizedSquareCrop, RandomSquareCrop,
    screen_transforms, Standardize,
)
from .data.select import select_sites
from .data.store import open_store, read_site, verify_store
from .data.pack import pack_screen
from .data.target import TargetBlock
from .data.hashes import find_duplicates
from .data.colors import stain_names
from .data.image import channel_limits, MultiChannelImage, show_channels, stains_to_rgb
from .data.block import MultiChannelImageBlock, screen_block, screen_dataloaders, SixChannelImageBlock

from .model.backbone import create_backbone
from .model.batchnorm import batchnorm_layers, BatchNormMode, BatchNormModeCallback, reestimate_batchnorm
from .model.head import create_screen_head, GeM
from .model.core import param_groups, ScreenModel

from .loss.multi import AsymmetricLoss, FocalLovaszLoss, LSEPLoss, MultiLabelBCELoss, MultiLabelFocalLoss
from .loss.single import AMSoftmaxLoss, ArcFaceLoss, CrossEntropyArcFaceLoss, OneHotBCELoss, SoftmaxCrossEntropyLoss
from .loss.by_name import create_loss, losses, multilabel_losses

from .profile.core import join_profiles, Profiles, profiles_of
from .profile.files import read_profiles
from .profile.correct import embedding_correction, postprocess_embeddings, TVN, well_means
from .profile.normalise import normalise_by, PycytominerSphering
from .profile.metrics import batch_probe, embedding_report, plot_embedding, project_2d, replicate_map, to_anndata

from .predict.submission import score_submission, score_table, write_submission
from .predict.tta import TTA
from .predict.core import Predictions, well_accuracy
from .predict.assign import accuracy_ladder, assign_classes, assign_predictions, infer_plate_groups
from .predict.blend import agreement, blend_predictions, blend_report, blend_weights, join_folds
from .predict.confidence import error_table, fit_confidence, kept_wells, Temperature
from .predict.sites import embed_sites, predict_sites

from .labels.adversarial import adversarial_report, choose_validation
from .labels.metrics import average_precision, f1_floors, f1_scores, label_report, macro_f1, plot_co_occurrence
from .labels.pixel_statistics import site_statistics
from .labels.retrieval import Retrieval
from .labels.submission import read_label_submission, score_label_submission, write_label_submission
from .labels.threshold import compare_thresholds, create_threshold
from .labels.stack import Stacker

from .quality.core import Quality, screen_quality

from .explain.cam import grad_cam
from .explain.sites import explain_sites, Explained

from .recipe.settings import (
    compare_recipes, DataSettings, InferenceSettings, LossSettings, ModelSettings, PseudoSettings, Recipe,
    TrainSettings,
)
from .recipe.check import recipe_from_json, recipe_to_json
from .recipe.published import change_recipe, get_recipe, laptop_recipe, list_recipes, recipes

from .train.averaging import EMA, KeepBest
from .train.loaders import recipe_dataloaders
from .train.mix import cutmix_images, LISA, mix_targets, mixup_images, ScreenCutMix, ScreenMixUp
from .train.optimizer import adam, adamw, radam
from .train.network import ImageOnly
from .train.precision import use_device
from .train.learner import screen_learner
from .train.pseudo import select_pseudo_labels

from .run.folder import load_run, read_run, Run
from .run.predict import embed_run, predict_run
from .run.blend import blend_runs
from .run.labels import label_score_table, submit_labels
from .run.submit import submit_run
from .run.explain import explain_run
from .run.curve import learning_curve
from .run.train import control_sites, find_lr, train_run
from .run.stack import stack_runs

from .report.accuracy import accuracy_by, confused_pairs, plot_intervals, plot_plate, worst_wells
from .report.core import make_report
from .report.quality import write_quality
from .report.curve import curve_sentences, plot_curve
from .report.explain import attention_sentence, channel_sentence, explained_figure, write_explained
from .report.apply import apply_run

from .kaggle.core import build_kernel, weights_folder
from .kaggle.download import download_competition, download_rxrx1
